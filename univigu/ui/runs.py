"""What was asked for and what came of it, for every run the app still remembers.

Runs of all visitors live in one store in the server's process, the oldest leaving first, so that memory stays flat. A
run's id is a secret: whoever has it may look at the run. This file knows nothing of models or Gradio.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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


@dataclass
class Run:
    id: str
    ask: Ask
    fps: float = 8.0
    messages: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)  # what a branch or a closer look starts from
    frames: np.ndarray | None = None  # the finished clip
    stop: bool = False
    event: str | None = None  # "done", "stopped" or "example" once nothing more will come

    @property
    def bytes(self) -> int:
        arrays = [value for state in self.states for value in state.values() if isinstance(value, np.ndarray)]
        arrays += [array for array in (self.frames, self.ask.frames) if array is not None]
        strips = sum(len(message["clean"] or "") + len(message["noisy"] or "") for message in self.messages)
        return sum(array.nbytes for array in arrays) + strips


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
        run.messages = [{**message, "run": run.id} for message in messages]
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
        return before + run.messages
