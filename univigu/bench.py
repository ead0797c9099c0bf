"""`python -m univigu bench`: what the second stream costs, as ratios measured side by side in one run.

A generation step with captions aboard against diffusers' own `WanTransformer3DModel` of the same size; a caption step
on a cached video against one that computes everything again; and the memory of each, every one in a process of its
own. Pairs take turns, so that whatever else the machine does slows both alike. It knows nothing of trained weights.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from tqdm import tqdm

from univigu.transformer import UMT5_VOCAB_SIZE, WAN_1_3B, UniViGUTransformer3DModel, VideoCache
from univigu.weights import pick_device

VIDEO_TOKENS_PER_CAPTION_TOKEN = 128
# Latents (frames, height, width). "small" keeps Wan's proportions, the vocabulary's share of the work included.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 1, "text_dim": 16},
        "latents": (2, 16, 16),
        "prompt": 16,
        "vocab": 64,
    },
    "small": {
        "model": {
            "num_attention_heads": 6,
            "attention_head_dim": 128,
            "ffn_dim": 4480,
            "num_layers": 4,
            "text_dim": 1024,
        },
        "latents": (8, 32, 32),
        "prompt": 512,
        "vocab": 8192,
    },
    "wan2.1-1.3b": {"model": WAN_1_3B, "latents": (21, 60, 104), "prompt": 512, "vocab": UMT5_VOCAB_SIZE},
}
STEPS = {
    "wan": "generation step, diffusers' Wan",
    "generate": "generation step, with caption tokens",
    "recomputed": "caption step, everything recomputed",
    "cached": "caption step, cached video",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, help="default: wan2.1-1.3b on a GPU, small on a CPU")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each pair (default: %(default)s)")


def command(options: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    if options.rounds < 1:
        raise ValueError(f"--rounds must be a whole number from 1 up, not {options.rounds}.")
    device = pick_device(options.device)
    size = options.size or ("small" if device.type == "cpu" else "wan2.1-1.3b")
    memory = {step: memory_of(step, size, device) for step in tqdm(STEPS, desc="memory", file=sys.stderr)}
    result = {**measure_times(size, device, options.rounds), "peak_megabytes": memory}
    return 0, result, report(result)


def measure_times(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Every step in turn, `rounds` times; ratios are medians over the turns."""
    steps = build_steps(size, device, tuple(STEPS))
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    with torch.no_grad():
        for turn in tqdm(range(rounds + 1), desc="time", file=sys.stderr):
            for step, take in steps.items():
                elapsed = seconds_of(take, device)
                if turn:  # the first warms up
                    seconds[step].append(elapsed)

    def ratio(dividend: str, divisor: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[dividend], seconds[divisor], strict=True))

    video_tokens = num_video_tokens(size)
    return {
        "size": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype_on(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "video_tokens": video_tokens,
        "caption_tokens": video_tokens // VIDEO_TOKENS_PER_CAPTION_TOKEN,
        "rounds": rounds,
        "generation_ratio": ratio("generate", "wan"),
        "cached_caption_speedup": ratio("recomputed", "cached"),
        "seconds": {step: statistics.median(values) for step, values in seconds.items()},
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['size']} on {result['device']} in {result['dtype']}, {result['threads']} CPU threads: "
        f"{result['video_tokens']:,} video tokens, {result['caption_tokens']} caption tokens, "
        f"medians of {result['rounds']} turns",
        "",
        f"{'':42}{'seconds':>10}{'peak MB':>10}",
    ]
    for step, what in STEPS.items():
        lines.append(f"{what:42}{result['seconds'][step]:>10.4f}{result['peak_megabytes'][step]:>10.0f}")
    return "\n".join(
        [
            *lines,
            "",
            f"A generation step takes {result['generation_ratio']:.3f} times Wan's.",
            f"A caption step on a cached video is {result['cached_caption_speedup']:.1f} times cheaper.",
        ]
    )


def num_video_tokens(size: str) -> int:
    frames, height, width = SIZES[size]["latents"]
    return frames * height * width // 4  # patches of 1 x 2 x 2


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def build_steps(size: str, device: torch.device, wanted: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """The wanted steps as calls, on random weights and states."""
    sizes, dtype = SIZES[size], dtype_on(device)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            wan = WanTransformer3DModel(**sizes["model"])
            ours = UniViGUTransformer3DModel.from_wan(wan, sizes["vocab"]) if wanted != ("wan",) else None
        finally:
            torch.set_default_dtype(torch.float32)
        latents = torch.randn(1, wan.config.in_channels, *sizes["latents"], dtype=dtype)
        prompt = torch.randn(1, sizes["prompt"], wan.config.text_dim, dtype=dtype)
        num_tokens = num_video_tokens(size) // VIDEO_TOKENS_PER_CAPTION_TOKEN
        tokens = torch.randint(sizes["vocab"], (1, num_tokens))
        time_video, time_text = torch.tensor([500.0]), torch.tensor([250.0])
    still = {"video_sees_tokens": False, "return_dict": False}
    cache = VideoCache()
    if "cached" in wanted:
        with torch.no_grad():
            ours(latents, time_video, prompt, tokens, time_text, video_cache=cache, **still)
    steps = {
        "wan": lambda: wan(latents, time_video, prompt, return_dict=False),
        "generate": lambda: ours(latents, time_video, prompt, tokens, time_text, return_dict=False),
        "recomputed": lambda: ours(latents, time_video, prompt, tokens, time_text, **still),
        "cached": lambda: ours(None, time_video, prompt, tokens, time_text, video_cache=cache, **still),
    }
    return {step: steps[step] for step in wanted}


def seconds_of(take: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    started = time.perf_counter()
    take()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def memory_of(step: str, size: str, device: torch.device) -> float:
    """The step's peak in megabytes, weights included: of a fresh process, less what it held before it built anything.
    A cached step's process has filled its cache, which takes a whole step, so its peak is not below a whole step's."""
    child = [sys.executable, "-m", "univigu.bench", step, size, str(device)]
    done = subprocess.run(child, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Measuring the memory of {step!r} failed:\n{done.stderr}")
    return float(done.stdout)


def _measure_memory(step: str, size: str, device: torch.device) -> float:
    before = _resident_megabytes("VmRSS")
    take = build_steps(size, device, (step,))[step]
    with torch.no_grad():
        take()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _resident_megabytes("VmHWM") - before


def _resident_megabytes(which: str) -> float:
    """Memory of this process: `"VmRSS"` now, `"VmHWM"` at its peak. Where there is no /proc, the peak for both."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux' getrusage would count the parent's peak too
        return float(re.search(rf"{which}:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    print(_measure_memory(sys.argv[1], sys.argv[2], torch.device(sys.argv[3])))
