"""The figures we publish of a model of the toy world: one command, one table, as JSON and Markdown.

Every figure is a share of held-out scenes or of the attributes they name, with its 95 % Wilson interval and beside
what chance, the oracle's own errors and specialised models of the same size reach. It judges clips by the oracle and
captions by their strict grammar, and knows nothing of how a model was trained.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import permutations
from math import sqrt
from pathlib import Path

import numpy as np
import torch

from training.ledger import replacing, writing
from training.sampling import decode, sample
from training.toybox.captions import parse_caption
from training.toybox.dataset import encode, vae_version, world_version
from training.toybox.facts import ACTOR_ATTRIBUTES, ATTRIBUTES, ActorFacts, Facts, compare, facts
from training.toybox.oracle import read_facts
from training.toybox.prompts import PROMPT_TOKENS, brief_with_facts
from training.toybox.render import render
from training.toybox.scenes import scene_at
from univigu import UniViGUPipeline
from univigu.weights import load

_AT_ONCE = 32  # scenes that share a pass, and are one process's work


@dataclass
class EvaluationConfig:
    count: int = 512  # held-out scenes, the same for every figure
    seed: int = 1  # of scenes, prompts and noise; training's scenes have seed 0
    steps: int = 30
    guidance_scale: float | None = None  # of the prompt; None is the model's own
    captioner: Path | None = None  # training.baselines
    generator: Path | None = None  # a pipeline that makes clips without captions
    processes: int = 1  # that share out the scenes


@dataclass(frozen=True)
class Share:
    """`right` of `total`, as a share with its 95 % interval."""

    right: int
    total: int

    def record(self) -> dict[str, float | int]:
        low, high = wilson(self.right, self.total)
        share = self.right / self.total if self.total else float("nan")
        return {"share": share, "low": low, "high": high, "right": self.right, "total": self.total}


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share."""
    if total == 0:
        return 0.0, 1.0
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(folder: Path, target: Path, settings: EvaluationConfig) -> dict:
    """Measure the pipeline in `folder`; writes evaluation.json and evaluation.md into `target`."""
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    _load.cache_clear()  # a folder may hold another model than the last time
    pipeline = _load(folder)
    if settings.guidance_scale is None:
        settings = replace(settings, guidance_scale=pipeline.config.default_guidance_scale)
    scenes = [scene_at(settings.seed, index, "held_out") for index in range(settings.count)]
    truth = [facts(scene) for scene in scenes]
    prompts = [brief_with_facts(s, np.random.default_rng([settings.seed, i])) for i, s in enumerate(scenes)]
    texts, named = [text for text, _ in prompts], [said for _, said in prompts]
    seeds = [settings.seed * 1_000_003 + index for index in range(settings.count)]
    clips = np.stack([render(scene) for scene in scenes])
    latents = torch.cat([encode(pipeline.vae, clips[start : start + 8]) for start in range(0, len(clips), 8)])
    result: dict = {
        "model": str(folder),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()},
        "world": world_version(),
        "vae": vae_version(folder / "vae"),
        "parameters": {name: _size(getattr(pipeline, name)) for name in ("transformer", "text_encoder", "vae")},
    }

    with _workers(settings.processes) as each:

        def look(shown: np.ndarray) -> list[Facts | None]:
            return each(read_facts, [(clip,) for clip in shown])

        def made(source: Path, task: str, given: torch.Tensor | None = None) -> tuple[list[Facts | None], list[str]]:
            """What clips show and captions say; a task has none of the one or the other."""
            guidance = 1.0 if task == "understand" else settings.guidance_scale
            words = [""] * settings.count if task == "understand" else texts
            parts = [slice(start, start + _AT_ONCE) for start in range(0, settings.count, _AT_ONCE)]
            jobs = [
                (
                    source,
                    task,
                    words[part],
                    seeds[part],
                    settings.steps,
                    guidance,
                    None if given is None else given[part],
                )
                for part in parts
            ]
            shown, said = zip(*each(_made, jobs), strict=True)
            return [one for part in shown for one in part], [text for part in said for text in part]

        # the autoencoder, and what the oracle makes of true clips and of its reconstructions
        restored = decode(pipeline, latents)
        error = ((restored.astype(np.float32) - clips) ** 2).reshape(len(clips), -1).mean(1)
        psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
        result["reconstruction"] = {"psnr": float(psnr.mean()), "psnr_worst": float(psnr.min())}
        result["oracle"] = {
            "true_clips": _shares(truth, look(clips)),
            "reconstructions": _shares(truth, look(restored)),
        }

        # understanding, from the clip alone
        tables = {"chance": _shares(truth, _others(settings)), "majority": _shares(truth, _majority(settings, truth))}
        tables["ours"] = _captions(truth, made(folder, "understand", latents)[1])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(settings.seed))
        tables["clip_replaced_by_noise"] = _captions(truth, made(folder, "understand", noise)[1])
        if settings.captioner is not None:
            tables["captioner"] = _captions(truth, _autoregressive(settings.captioner, latents, pipeline, result))
        result["understanding"] = tables

        # generation: what the prompt names, read by the oracle
        tables = {"chance": _shares(named, _others(settings))}
        tables["true_clips"] = _shares(named, truth)
        shown = made(folder, "generate")[0]
        tables["ours"] = _shares(named, shown)
        for number, name in enumerate(("one_actor", "two_actors"), 1):  # the second is the harder half
            part = [i for i, scene in enumerate(truth) if scene.count == number]
            if part:
                tables[f"ours_{name}"] = _shares([named[i] for i in part], [shown[i] for i in part])
        if settings.generator is not None:
            result["parameters"]["generator"] = _size(_load(settings.generator).transformer)
            tables["generator"] = _shares(named, made(settings.generator, "generate")[0])
        result["generation"] = tables

        # both at once
        shown, captions = made(folder, "joint")
        said = [parse_caption(text) for text in captions]
        result["joint"] = {
            "caption_against_clip": _captions(shown, captions),
            "clip_against_prompt": _shares(named, shown),
            "caption_against_prompt": _shares(named, said),
            "left_out_by_the_prompt": _count([left_out(*one) for one in zip(said, named, shown, strict=True)]),
        }
    result["speed"] = _speed(pipeline, texts[0], clips[0], settings)
    result["examples"] = [
        {"prompt": text, "caption": caption} for text, caption in zip(texts[:12], captions[:12], strict=True)
    ]
    for name, text in (("json", json.dumps(result, indent=2) + "\n"), ("md", to_markdown(result))):
        with replacing(target / f"evaluation.{name}", target / f".evaluation.{name}.partial") as partial:
            partial.write_text(text, encoding="utf-8")
    print(to_markdown(result))
    return result


@lru_cache(maxsize=2)
def _load(folder: Path) -> UniViGUPipeline:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"'{folder}' holds no model: give a pipeline folder, such as assets/toybox.")
    pipeline = load(folder)
    # a generator is stored as a Wan pipeline, which knows nothing of these sizes
    sizes = {"default_num_frames": 17, "default_height": 64, "default_width": 64, "max_prompt_tokens": PROMPT_TOKENS}
    pipeline.register_to_config(**sizes)
    return pipeline


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _made(folder, task, prompts, seeds, steps, guidance, clips) -> tuple[list[Facts | None], list[str]]:
    pipeline = _load(folder)
    latents, captions = sample(pipeline, task, prompts, seeds, steps, guidance, clips, _AT_ONCE)
    shown = [] if latents is None else [read_facts(clip) for clip in decode(pipeline, latents)]
    return shown, captions or []


@contextmanager
def _workers(processes: int) -> Iterator[Callable[[Callable, list[tuple]], list]]:
    """A function that calls another with each of many arguments and gives the results in their order."""
    if processes == 1:
        yield lambda function, arguments: [function(*some) for some in arguments]
        return
    threads = max(1, torch.get_num_threads() // processes)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (threads,))
    try:
        yield lambda function, arguments: list(pool.map(function, *zip(*arguments, strict=True)))
    finally:
        pool.shutdown(cancel_futures=True)


# ---- what is counted ----


def _shares(stated: list[Facts], shown: list[Facts | None]) -> dict[str, dict]:
    return _count([compare(one, other) for one, other in zip(stated, shown, strict=True)])


def _count(compared: list[dict[str, tuple[bool, ...]]]) -> dict[str, dict]:
    """Per attribute, over all namings (`attributes`), and over items in which everything agrees (`whole`)."""
    right, total = Counter(), Counter()
    for values in compared:
        for name, part in values.items():
            right[name] += sum(part)
            total[name] += len(part)
        if values:
            right["whole"] += all(all(part) for part in values.values())
            total["whole"] += 1
    counts = {name: Share(right[name], total[name]) for name in ATTRIBUTES if total[name]}
    pooled = Share(sum(s.right for s in counts.values()), sum(s.total for s in counts.values()))
    return {
        name: share.record()
        for name, share in {**counts, "attributes": pooled, "whole": Share(right["whole"], total["whole"])}.items()
    }


def _captions(shown: list[Facts], captions: list[str]) -> dict[str, dict]:
    """How captions agree with what is there, and how many are sentences of the grammar."""
    said = [parse_caption(text) for text in captions]
    table = _shares(shown, said)
    table["grammatical"] = Share(sum(one is not None for one in said), len(said)).record()
    return table


def left_out(said: Facts | None, named: Facts, shown: Facts) -> dict[str, tuple[bool, ...]]:
    """What a caption says beyond what its prompt named, and whether the clip shows it; nothing of an unreadable one."""
    if said is None:
        return {}
    agreed = compare(said, shown)  # a caption names everything, so these are in the order of its actors
    result = {
        name: agreed[name] for name in ("place", "time", "count") if name in agreed and getattr(named, name) is None
    }
    # which of the prompt's actors each of the caption's is; one that the prompt left out has nothing named
    others = list(named.actors) + [ActorFacts()] * (len(said.actors) - len(named.actors))

    def agreement(order: tuple[ActorFacts, ...]) -> int:
        pairs = zip(said.actors, order, strict=False)
        return sum(getattr(a, name) == getattr(b, name) for a, b in pairs for name in ACTOR_ATTRIBUTES)

    order = max(permutations(others, len(said.actors)), key=agreement)
    for name in ACTOR_ATTRIBUTES:
        part = tuple(agreed[name][i] for i, other in enumerate(order) if getattr(other, name) is None)
        if part:
            result[name] = part
    return result


def _others(settings: EvaluationConfig) -> list[Facts]:
    """Other scenes: what one gets by guessing as scenes are drawn."""
    return [facts(scene_at(settings.seed + 1, index, "train")) for index in range(settings.count)]


def _majority(settings: EvaluationConfig, truth: list[Facts]) -> list[Facts]:
    """The one caption that is right most often in training: the commonest value of everything."""
    drawn = [facts(scene_at(0, index, "train")) for index in range(1000)]
    common = {
        name: Counter(getattr(f, name) for f in drawn).most_common(1)[0][0] for name in ("place", "time", "count")
    }
    actors = [actor for f in drawn for actor in f.actors]
    values = {name: Counter(getattr(a, name) for a in actors).most_common(2) for name in ACTOR_ATTRIBUTES}
    chosen = [
        ActorFacts(**{name: ranked[min(number, len(ranked) - 1)][0] for name, ranked in values.items()})
        for number in range(common["count"])
    ]
    return [Facts(common["place"], common["time"], common["count"], tuple(chosen))] * len(truth)


def _autoregressive(folder: Path, latents: torch.Tensor, pipeline: UniViGUPipeline, result: dict) -> list[str]:
    from training.baselines import AutoregressiveCaptioner, read_captions

    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' holds no captioner: give the weights folder of python -m training captioner.")
    captioner = AutoregressiveCaptioner.from_pretrained(folder).eval().to(pipeline.vae.device)
    result["parameters"]["captioner"] = _size(captioner)
    return read_captions(captioner, latents.to(pipeline.vae.device), pipeline.tokenizer)


def _speed(pipeline: UniViGUPipeline, prompt: str, clip: np.ndarray, settings: EvaluationConfig) -> dict:
    """Seconds of one run through the pipeline itself, decoding included: the best of three."""
    steps, scale = settings.steps, settings.guidance_scale
    runs = {
        "generate": lambda: pipeline.generate(prompt, num_inference_steps=steps, guidance_scale=scale, seed=0),
        "understand": lambda: pipeline.understand(clip, num_inference_steps=steps, seed=0),
        "joint": lambda: pipeline.joint(prompt, num_inference_steps=steps, guidance_scale=scale, seed=0),
    }
    speed: dict = {
        "device": str(pipeline.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "steps": steps,
    }
    pipeline.set_progress_bar_config(disable=True)
    for name, run in runs.items():
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        speed[f"{name}_seconds"] = min(seconds)
    return speed


# ---- how it is written ----


def to_markdown(result: dict) -> str:
    """The result as tables; every share in per cent with its 95 % interval."""
    settings = result["settings"]
    lines = [
        f"# Figures of `{result['model']}`",
        "",
        f"{settings['count']} held-out scenes (attribute combinations that training never shows), seed "
        f"{settings['seed']}, {settings['steps']} steps, guidance {settings['guidance_scale']}. In brackets the 95 % "
        "Wilson interval; attributes of one scene are counted as if independent.",
        "",
        "Parameters: " + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in result["parameters"].items()) + ".",
        "",
        f"Autoencoder: {result['reconstruction']['psnr']:.1f} dB PSNR on average, "
        f"{result['reconstruction']['psnr_worst']:.1f} dB at worst.",
    ]
    titles = {
        "oracle": "The oracle reading clips whose content is known",
        "understanding": "Understanding: the caption against the scene, from the clip alone",
        "generation": "Generation: the clip, read by the oracle, against what the prompt names",
        "joint": "Joint: caption and clip made together, the clip read by the oracle",
    }
    for part, title in titles.items():
        tables = result[part]
        rows = [
            row for row in (*ATTRIBUTES, "attributes", "whole", "grammatical") if any(row in t for t in tables.values())
        ]
        lines += ["", f"## {title}", "", "| | " + " | ".join(name.replace("_", " ") for name in tables) + " |"]
        lines.append("|---" * (len(tables) + 1) + "|")
        for row in rows:
            cells = [_cell(table.get(row)) for table in tables.values()]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    speed = result["speed"]
    seconds = ", ".join(f"{name} {speed[f'{name}_seconds']:.2f} s" for name in ("generate", "understand", "joint"))
    lines += [
        "",
        "## Speed",
        "",
        f"{speed['steps']} steps, {speed['device']} with {speed['threads']} threads, decoding included: {seconds}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(record: dict | None) -> str:
    if record is None:
        return ""
    return f"{100 * record['share']:.1f} ({100 * record['low']:.1f}–{100 * record['high']:.1f})"
