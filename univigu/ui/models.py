"""The models the app has loaded, and the work they do for it: taking steps, and looking closer at one.

On ZeroGPU the work runs in a forked process that has the GPU, so what goes in and comes out is plain data: `Ask`,
messages and numpy arrays. Elsewhere the same functions run in place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from univigu import Step, Trajectory, UniViGUPipeline
from univigu.sampler import video_scheduler
from univigu.ui.runs import Ask, Run
from univigu.weights import EMBEDDED, load

try:
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(**options: Any):
        return lambda function: function


CHOICES = {
    "Toybox, the embedded model: any computer, nothing to download": EMBEDDED,
    "Wan2.1 1.3B, a start for training: a GPU with 24 GB and a large download": "wan2.1-1.3b",
    "Wan2.1 14B, a start for training: a GPU with 80 GB and a very large download": "wan2.1-14b",
    "Uni-ViGU as its authors released it: a GPU with 24 GB and a large download": "released",
}

_loaded: dict[str, UniViGUPipeline] = {}
_loading = threading.Lock()
_working = threading.Lock()  # taken only where the GPU is: a fork that copied it locked would wait for ever
_first: str | None = None
_device: str | None = None


def prepare(name: str, device: str | None = None) -> UniViGUPipeline:
    """Load the model the app starts with; it stays, others come and go."""
    global _first, _device
    _first, _device = name, device
    return pipeline(name)


def pipeline(name: str) -> UniViGUPipeline:
    """A model by name, folder or Hub id, loaded on first use; besides the first, one is kept."""
    with _loading:
        if name not in _loaded:
            for other in [other for other in _loaded if other != _first]:
                del _loaded[other]
            pipe = load(name, device=_device)
            if pipe.previewer is None:  # decoding every step with Wan's autoencoder would take longer than the steps
                pipe.fit_previewer()
            pipe.set_progress_bar_config(disable=True)
            _loaded[name] = pipe
        return _loaded[name]


def steps(run: Run, parent: Run | None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The run's steps as (message, state)."""
    start = None if parent is None else state_at(parent, run.ask.branch_at)
    pipeline(run.ask.model)
    taken = _take_steps(run.id, run.ask, start)
    try:
        yield from taken
    except torch.OutOfMemoryError:
        raise ValueError(
            "The memory of this device is too small for that; try fewer frames or a smaller size."
        ) from None
    finally:
        taken.close()


def state_at(run: Run, index: int) -> dict[str, Any]:
    """What the run's state was after a step."""
    number = run.steps.find(index)
    if number is None:
        raise ValueError(f"This run has no step {index + 1} to go on from.")
    state = run.steps.state(number)
    state.pop("frames", None)
    return state


def token_heat(run: Run, index: int, token: int) -> np.ndarray:
    """Where a caption token looks at a step: float32 (F, H, W), at most 1."""
    state = state_at(run, index)
    if state["token_state"] is None:
        raise ValueError("This run carries no caption, so there is no word to follow.")
    if not 0 <= token < len(state["token_state"][0]):
        raise ValueError(f"There is no token {token + 1} in this caption.")
    pipeline(run.ask.model)
    return _look(run.ask.model, run.ask.task, run.ask.prompt, state, token)


def _seconds_of_steps(run_id: str, ask: Ask, start: Any) -> int:
    """What a run may take on ZeroGPU: about 2 s for a step of Wan 1.3B on 32,760 video tokens, twice with guidance."""
    config = _loaded[ask.model].config
    size = [ask.settings.get(key) or config[f"default_{key}"] for key in ("num_frames", "height", "width")]
    share = (size[0] + 3) // 4 * size[1] * size[2] / 256 / 32760
    return round(15 + ask.settings["num_inference_steps"] * 4 * share)


@on_gpu(duration=_seconds_of_steps)
def _take_steps(run_id: str, ask: Ask, start: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    pipe = _loaded[ask.model]
    options = dict(ask.settings)
    scheduler = options.pop("scheduler")
    scheduler = None if scheduler == "own" else video_scheduler(scheduler, pipe.scheduler)
    trajectory = Trajectory(
        task=ask.task, prompt=ask.prompt, seed=ask.seed, settings=ask.settings, fps=pipe.config.default_fps, run=run_id
    )
    stream = pipe.stream(
        ask.task,
        ask.prompt,
        ask.frames,
        seed=ask.seed,
        scheduler=scheduler,
        start=None if start is None else _unpacked(start),
        caption=ask.caption,
        pin_caption=ask.pin_caption,
        **options,
    )
    # a run that is stopped ends the step that is being taken, and only then its stream
    with contextlib.closing(stream), contextlib.closing(_ahead(stream)) as steps_taken:
        for step in steps_taken:
            yield trajectory.message(step), {**_packed(step), "frames": step.final_frames}


def _ahead(stream: Iterator[Step]) -> Iterator[Step]:
    """Take each step while the message of the one before is made and sent, which lasts a third as long; one at a time,
    so that other runs and closer looks get their turn in between."""

    def take() -> Step | None:
        with _working:
            return next(stream, None)

    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(take)
        while (step := coming.result()) is not None:
            coming = worker.submit(take)
            yield step


@on_gpu(duration=15)
def _look(model: str, task: str, prompt: str, state: dict[str, Any], token: int) -> np.ndarray:
    with _working:
        return _loaded[model].token_attention(_unpacked(state), token, prompt=prompt, task=task)


TENSORS = ("latents", "token_state", "generator_state")


def _packed(step: Step) -> dict[str, Any]:
    tensors = {name: getattr(step, name) for name in TENSORS}
    return {
        "index": step.index,
        "total": step.total,
        "tau_video": step.tau_video,
        "tau_text": step.tau_text,
        **{name: None if tensor is None else tensor.cpu().numpy() for name, tensor in tensors.items()},
    }


def _unpacked(state: dict[str, Any]) -> Step:
    tensors = {name: None if state[name] is None else torch.from_numpy(state[name]) for name in TENSORS}
    return Step(**{**state, **tensors})
