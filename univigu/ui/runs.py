"""What was asked for and what came of it, for every run the app still remembers.

Runs of all visitors live in one store, the oldest leaving first. Their steps lie in files that have no name, so that
the server's memory stays flat and nothing is left behind however it ends. A run's id is a secret: whoever has it may
look at the run. This file knows nothing of models or Gradio.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import load, save

KEPT_RUNS = 32
KEPT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One run as it was asked for. `settings` are JSON-able and become part of its link."""

    model: str
    task: str
    prompt: str
    seed: int
    settings: dict[str, Any]
    frames: np.ndarray | None = None  # the clip to understand
    parent: str | None = None  # the run this one branches off
    branch_at: int | None = None
    caption: str | None = None  # what the caption is to be from there
    pin_caption: bool = False
    beside: str | None = None  # the run to show it next to


class Steps:
    """The steps of a run, in the order they came: a message for the page, and the state a branch or a closer look
    starts from, a dictionary of arrays and of what JSON can hold."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, it is closed with the run
        self._index: list[tuple[int, int, int, dict[str, Any]]] = []  # where each step's message and state end
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def bytes(self) -> int:
        return self._index[-1][2] if self._index else 0

    def add(self, message: dict[str, Any], state: dict[str, Any]) -> None:
        arrays = {name: np.ascontiguousarray(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in state.items() if name not in arrays}
        parts = json.dumps(message).encode(), save(arrays)
        with self._lock:
            start = self.bytes
            try:
                self._file.seek(start)
                for part in parts:
                    left = memoryview(part)
                    while left:  # a disk that fills up may take the first half
                        left = left[self._file.write(left) :]
            except OSError as error:
                raise ValueError(
                    f"The server cannot keep this run's steps ({error.strerror}); its disk needs room for them."
                ) from None
            middle = start + len(parts[0])
            self._index.append((start, middle, middle + len(parts[1]), rest))

    def message(self, number: int) -> dict[str, Any]:
        start, middle, _, _ = self._index[number]
        return json.loads(self._read(start, middle))

    def find(self, index: int) -> int | None:
        """Which of the steps has a state of that index; those of a branch do not begin at 0, an example's have none."""
        return next((number for number, (*_, rest) in enumerate(self._index) if rest.get("index") == index), None)

    def state(self, number: int) -> dict[str, Any]:
        _, middle, end, rest = self._index[number]
        return {**rest, **load(self._read(middle, end))}

    def _read(self, start: int, end: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            parts = []
            while start < end and (part := self._file.read(end - start)):
                parts.append(part)
                start += len(part)
        return b"".join(parts)


@dataclass
class Run:
    id: str
    ask: Ask
    fps: float = 8.0
    steps: Steps = field(default_factory=Steps)
    stop: bool = False
    event: str | None = None  # "done", "stopped" or "example" once nothing more will come

    @property
    def bytes(self) -> int:
        clip = self.ask.frames
        return self.steps.bytes + (0 if clip is None else clip.nbytes)

    def messages(self) -> list[dict[str, Any]]:
        return [self.steps.message(number) for number in range(len(self.steps))]

    def last_message(self) -> dict[str, Any] | None:
        return self.steps.message(len(self.steps) - 1) if len(self.steps) else None

    @property
    def frames(self) -> np.ndarray | None:
        """The finished clip."""
        return self.steps.state(len(self.steps) - 1).get("frames") if len(self.steps) else None


class Runs:
    """The store. Safe to use from several threads."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._examples: dict[str, Run] = {}
        self._lock = threading.Lock()

    def start(self, ask: Ask, fps: float) -> Run:
        run = Run(id=secrets.token_urlsafe(12), ask=ask, fps=fps)
        with self._lock:
            self._runs[run.id] = run
            while len(self._runs) > 1 and (
                len(self._runs) > KEPT_RUNS or sum(kept.bytes for kept in self._runs.values()) > KEPT_BYTES
            ):
                self._runs.popitem(last=False)[1].stop = True
        return run

    def add_example(self, task: str, messages: list[dict[str, Any]]) -> None:
        run = Run(id=f"example-{task}", ask=None, fps=messages[-1]["frame"]["fps"], event="example")
        for message in messages:
            run.steps.add({**message, "run": run.id}, {})
        self._examples[run.id] = run

    def get(self, run_id: str) -> Run:
        with self._lock:
            run = self._examples.get(run_id) or self._runs.get(run_id)
            if run is None:
                raise ValueError("This run is no longer kept here; start it again to go on with it.")
            if run_id in self._runs:
                self._runs.move_to_end(run_id)
            return run

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._examples or run_id in self._runs

    def messages(self, run: Run) -> list[dict[str, Any]]:
        """All steps of a run; a branch's begin with those of the run it left."""
        before = []
        if run.ask and run.ask.parent and run.ask.parent in self:
            before = self.messages(self.get(run.ask.parent))[: run.ask.branch_at + 1]
        return before + run.messages()
