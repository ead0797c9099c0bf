"""`python -m univigu generate | understand | joint | import | bench`.

Reads options, checks them before anything heavy is loaded, runs the pipeline with a progress bar, writes files.
Results go to stdout (one JSON object with `--json`), everything else to stderr. Exit codes: 0 done, 2 bad input (one
sentence on stderr), 130 stopped with Ctrl-C, after keeping what there was. It knows nothing of tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from univigu import bench
from univigu.sampler import ORDERS, VIDEO_SCHEDULERS, video_scheduler
from univigu.trajectory import Step, Trajectory
from univigu.video import probe, read_video
from univigu.weights import EMBEDDED, WAN_1_3B_REPO, find_model, load, load_lora, load_released, load_wan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP_ENDINGS, TRAJECTORY_ENDINGS = (".mp4", ".gif"), (".html", ".json")
DONE, BAD_INPUT, STOPPED = 0, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        options = parser().parse_args(arguments)
        if not sys.stderr.isatty():  # bars of loading are for eyes
            diffusers_logging.disable_progress_bar()
            transformers_logging.disable_progress_bar()
        # What libraries print is not the result.
        with contextlib.redirect_stdout(sys.stderr):
            code, result, plain = options.command(options)
    except ValueError as error:
        print(f"univigu: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("Stopped; there was nothing to keep yet.", file=sys.stderr)
        return STOPPED
    except torch.OutOfMemoryError:
        print(
            "univigu: the memory of this device is too small for that; try --dtype bfloat16 or a smaller clip.",
            file=sys.stderr,
        )
        return BAD_INPUT
    if options.json:
        print(json.dumps(result))
    elif plain:
        print(plain)
    return code


# ---------------------------------------------------------------------------------------------------------- the options


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help).")


def whole(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not {text!r}")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m univigu", description="Generate video from text, describe video in text, or do both.")
    commands = top.add_subparsers(required=True, metavar="generate | understand | joint | import | bench")

    def command(name: str, function, about: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=about, description=about)
        one.set_defaults(command=function)
        one.add_argument("--json", action="store_true", help="print the result as one JSON object, and nothing else")
        return one

    generate = command("generate", lambda options: run("generate", options), "A clip from a prompt.")
    generate.add_argument("prompt")
    understand = command("understand", lambda options: run("understand", options), "A caption from a clip.")
    understand.add_argument("video", help="a video file")
    understand.add_argument("--prompt", default="", help="a hint at what the clip shows")
    understand.add_argument("--start", type=number, default=0.0, help="the second of the file to begin at")
    understand.add_argument("--end", type=number, help="the second of the file to end at")
    understand.add_argument("--fps", type=number, help="frames to take per second; default: spread over the whole span")
    understand.add_argument(
        "--fit", choices=("crop", "pad"), default="crop", help="how a clip of another shape is fitted"
    )
    understand.add_argument(
        "--recompute-video-every",
        type=whole,
        metavar="K",
        help="reuse the clip's keys and values for K steps: an approximation, for models whose video sees the caption",
    )
    joint = command("joint", lambda options: run("joint", options), "A clip and its detailed caption, together.")
    joint.add_argument("prompt", nargs="?", default="")
    joint.add_argument("--order", choices=ORDERS, default="together", help="which of the two is denoised first")

    for one in (generate, understand, joint):
        one.add_argument(
            "--model", default=EMBEDDED, help="a name, folder, checkpoint or Hub id (default: %(default)s)"
        )
        one.add_argument("--wan", default=WAN_1_3B_REPO, help="the Wan2.1 model that a released checkpoint goes with")
        one.add_argument("--lora", help="a LoRA for the transformer: a folder or a .safetensors file")
        one.add_argument("--device", help="cpu, cuda, cuda:1, …; default: a GPU where there is one")
        one.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
        one.add_argument("--seed", type=int, help="repeats a run; default: a new one, which is reported")
        one.add_argument("--steps", type=whole, help="denoising steps; default: the model's own")
        one.add_argument("--frames", type=whole, help="frames of the clip; default: the model's own")
        one.add_argument("--height", type=whole)
        one.add_argument("--width", type=whole)
        one.add_argument("--save-trajectory", metavar="FILE", help="every step: .html (page with a slider) or .json")
    for one in (generate, joint):
        one.add_argument("--guidance", type=number, help="how hard the clip follows the prompt; 1 is not at all")
        one.add_argument("--negative-prompt", default="", help="what the clip should not show")
        one.add_argument("--scheduler", choices=VIDEO_SCHEDULERS, help="the clip's solver; default: the model's own")
        one.add_argument("--output", metavar="FILE", help="where the clip goes: .mp4 or .gif")
    for one in (understand, joint):
        one.add_argument(
            "--caption-guidance", type=number, help="how hard the caption follows the clip; 1 is not at all"
        )

    importing = command("import", import_model, "Save a Wan2.1 model or the released checkpoint in our own format.")
    importing.add_argument("--wan", required=True, help="the Wan2.1 text-to-video model: a diffusers folder or Hub id")
    importing.add_argument("--released", help="the released Uni-ViGU checkpoint (.pth, .safetensors) or its Hub id")
    importing.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder")
    importing.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")
    importing.add_argument("--no-previewer", action="store_true", help="do not fit the quick preview of latents")

    benching = command("bench", bench.command, "Time and memory against Wan, measured side by side.")
    bench.add_options(benching)
    return top


# ----------------------------------------------------------------------------------------------------------- the tasks


def run(task: str, options: argparse.Namespace) -> tuple[int, dict[str, Any], str | None]:
    output = getattr(options, "output", None)
    if task != "understand" and not (output or options.save_trajectory):
        raise ValueError(
            f"{task} makes a clip: say where it goes with --output clip.mp4 or --save-trajectory run.html."
        )
    check_target("--output", output, CLIP_ENDINGS)
    check_target("--save-trajectory", options.save_trajectory, TRAJECTORY_ENDINGS)
    if task == "understand":
        probe(options.video)  # a bad file is found out before the model is loaded
    if options.seed is None:
        options.seed = secrets.randbelow(2**31)

    pipe = load(options.model, options.device, DTYPES.get(options.dtype), options.wan)
    if options.lora:
        load_lora(pipe, options.lora)
    defaults = pipe.config
    size = {
        "num_frames": defaults.default_num_frames if options.frames is None else options.frames,
        "height": defaults.default_height if options.height is None else options.height,
        "width": defaults.default_width if options.width is None else options.width,
    }
    pipe.check_size(**size)
    settings: dict[str, Any] = {
        "num_inference_steps": defaults.default_steps if options.steps is None else options.steps,
        **size,
    }
    scheduler = video = None
    fps = defaults.default_fps
    if task == "understand":
        span = {"fps": options.fps, "start": options.start, "end": options.end, "fit": options.fit}
        clip = read_video(options.video, **size, **span)
        video, fps = clip.frames, clip.fps
        settings["recompute_video_every"] = options.recompute_video_every
    else:
        settings |= {"guidance_scale": options.guidance, "negative_prompt": options.negative_prompt}
        if options.scheduler:
            scheduler = video_scheduler(options.scheduler, pipe.scheduler)
    if task != "generate":
        settings["caption_guidance"] = options.caption_guidance
    if task == "joint":
        settings["order"] = options.order
    settings = {name: value for name, value in settings.items() if value is not None}

    started = time.perf_counter()
    stream = pipe.stream(
        task,
        options.prompt,
        video,
        seed=options.seed,
        scheduler=scheduler,
        decode_last=task != "understand" or options.save_trajectory is not None,
        **settings,
    )
    steps, stopped = walk_with_bar(stream, keep_all=options.save_trajectory is not None)
    if not steps:
        raise KeyboardInterrupt
    last = steps[-1]
    if scheduler is not None:
        settings["scheduler"] = options.scheduler
    trajectory = Trajectory(
        task=task,
        prompt=options.prompt,
        seed=options.seed,
        settings=settings,
        fps=fps,
        steps=steps,
        frames=last.frames("clean") if task != "understand" else None,
        text=last.text if task != "generate" else None,
    )
    targets = [target for target in (output, options.save_trajectory) if target]
    for target in targets:
        try:
            trajectory.save(target)
        except OSError as error:
            raise ValueError(f"{target!r} cannot be written: {error.strerror}.") from error
    if stopped:
        kept = f"kept what was there: {' and '.join(targets)}" if targets else "the caption so far follows"
        print(f"Stopped after step {last.index + 1} of {last.total}; {kept}.", file=sys.stderr)
    elif targets:
        print(f"Wrote {' and '.join(targets)} (seed {options.seed}).", file=sys.stderr)
    result = {
        "task": task,
        "model": options.model,
        "prompt": options.prompt,
        "cut_from_prompt": pipe.cut_from_prompt(options.prompt) or None,
        "video": getattr(options, "video", None),
        "seed": options.seed,
        "settings": settings,
        "text": trajectory.text,
        "output": output,
        "trajectory": options.save_trajectory,
        "fps": fps,
        "steps_done": last.index + 1,
        "stopped": stopped,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return (STOPPED if stopped else DONE), result, trajectory.text


def walk_with_bar(stream: Iterator[Step], keep_all: bool) -> tuple[list[Step], bool]:
    """A run's steps (or the last alone), and whether Ctrl-C ended it; what was done until then is kept."""
    steps: list[Step] = []
    bar = None
    try:
        for step in stream:
            # kept before anything else: Ctrl-C may come at any line
            if keep_all or not steps:
                steps.append(step)
            else:
                steps[0] = step
            bar = bar or tqdm(total=step.total, unit="step", file=sys.stderr)
            bar.update()
    except KeyboardInterrupt:
        return steps, True
    finally:
        stream.close()
        if bar is not None:
            bar.close()
    return steps, False


def check_target(option: str, path: str | None, endings: tuple[str, ...]) -> None:
    """A place that cannot be written is found out before the run, not after it."""
    if path is None:
        return
    if Path(path).suffix.lower() not in endings:
        raise ValueError(f"{option} must end in {' or '.join(endings)}, not {path!r}.")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{option}: there is no folder {str(Path(path).absolute().parent)!r}.")


def import_model(options: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {options.output!r} is not empty; give a new folder.")
    given = {"dtype": DTYPES[options.dtype], "previewer": not options.no_previewer}
    if options.released:
        pipe = load_released(options.released, options.wan, **given)
    else:
        pipe = load_wan(options.wan, **given)
    pipe.save_pretrained(output)
    found = find_model(output)
    parameters = sum(weight.numel() for weight in pipe.transformer.parameters())
    result = {"kind": found.kind, "output": str(output), "parameters": parameters, "dtype": options.dtype}
    return DONE, result, f"Saved to {output}: {parameters:,} parameters in the transformer."
