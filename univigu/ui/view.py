"""The trajectory viewer as a Gradio component, and the server's side of it: steps missed, a closer look, files.

The page calls these functions directly, so everything they are given is checked and every answer is plain JSON.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import gradio as gr
import numpy as np

from univigu.trajectory import Trajectory, page, saved_run, strip_frames
from univigu.ui import models
from univigu.ui.runs import Run, Runs

VIEWER = resources.files("univigu") / "ui" / "viewer"
HEAT_SIDE, HEAT_FRAMES = 32, 24
MIME = {
    "mp4": "video/mp4",
    "gif": "image/gif",
    "txt": "text/plain;charset=utf-8",
    "json": "application/json",
    "html": "text/html",
}

# What Gradio provides, in the viewer's terms. The words 'branch' and 'another' name the events that Python listens to.
ON_LOAD = """
const host = { steps: server.steps, attend: server.attend, take: server.take,
  trigger: (name, data) => trigger({ branch: 'branch', another: 'another' }[name], data) };
const viewer = mountTrajectoryViewer(element.querySelector('.uvg'), host);
const receive = () => viewer.receive(JSON.parse(props.value));
receive();
watch('value', receive);
"""


def trajectory_view(runs: Runs, value: dict[str, Any] | None = None, **options: Any) -> gr.HTML:
    """Takes viewer messages, one a step, and holds them all in the page.

    Each is a string of JSON: of anything else Gradio's page copies and watches every single word and number.
    A function and not a subclass: Gradio writes a stub file beside every module that subclasses a component."""

    def read(name: str) -> str:
        return (VIEWER / name).read_text(encoding="utf-8")

    def answer(function: Callable[[Runs, dict], Any]) -> Callable[[dict], Any]:
        def serve(request: dict):
            try:
                return function(runs, request)
            except (ValueError, LookupError, TypeError) as error:
                return {"error": str(error) if isinstance(error, ValueError) else "This request is incomplete."}

        serve.__name__ = function.__name__
        return serve

    return gr.HTML(
        value=json.dumps(value),
        html_template=read("viewer.html"),
        css_template=read("viewer.css"),
        js_on_load=read("viewer.js") + ON_LOAD,
        server_functions=[answer(steps), answer(attend), answer(take)],
        apply_default_css=False,
        **options,
    )


def steps(runs: Runs, request: dict) -> list[dict[str, Any]]:
    """The messages of a run that the page does not have yet."""
    if request["run"] not in runs:  # a page left open longer than runs are kept
        return []
    run, have = runs.get(request["run"]), set(request["have"])
    missing = [message for message in run.messages() if message["index"] not in have]
    return [*missing, {"run": run.id, "event": run.event}] if run.event else missing


def attend(runs: Runs, request: dict) -> dict[str, Any]:
    """Where a word looks, as bytes the page can draw."""
    heat = models.token_heat(runs.get(request["run"]), int(request["step"]), int(request["token"]))
    if len(heat) > HEAT_FRAMES:
        heat = heat[np.linspace(0, len(heat) - 1, HEAT_FRAMES).round().astype(int)]
    height, width = heat.shape[1:]
    scale = min(1, HEAT_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in heat])
    data = (255 * small / max(small.max(), 1e-12)).astype(np.uint8)
    encoded = base64.b64encode(data.tobytes()).decode("ascii")
    return {"heat": encoded, "count": len(data), "height": size[1], "width": size[0]}


def take(runs: Runs, request: dict) -> dict[str, Any]:
    """One file to take away, of the run last shown; the page holds both where two are compared."""
    kind = request["kind"]
    if kind not in MIME:
        raise ValueError(f"A run can be taken away as {', '.join(MIME)}, not as {kind!r}.")
    shown = [runs.get(run_id) for run_id in request["runs"]]
    run = shown[-1]
    messages = [{**message, "run": run.id} for message in runs.messages(run)]
    if not messages:
        raise ValueError("This run has no step yet; wait for the first one.")
    if kind == "txt":
        data = (messages[-1]["text"] or "").encode()
    elif kind == "json":
        data = saved_run(messages, run.fps).encode()
    elif kind == "html":
        whole = [[{**message, "run": one.id, "kept": False} for message in runs.messages(one)] for one in shown]
        data = page([messages for messages in whole if messages]).encode()
    else:
        data = clip_file(run, kind)
    name = f"univigu-{messages[-1]['task']}-{messages[-1]['seed']}.{kind}"
    return {"name": name, "mime": MIME[kind], "data": base64.b64encode(data).decode("ascii")}


def clip_file(run: Run, kind: str) -> bytes:
    """The finished clip as mp4 or gif; of a run that was stopped, what it had come to."""
    last, frames = run.last_message(), run.frames
    frames = strip_frames(last) if frames is None else frames
    clip = Trajectory(
        task=last["task"], prompt=None, seed=None, settings={}, fps=last["frame"]["fps"], frames=frames, steps=[]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{kind}"
        clip.save(path)
        return path.read_bytes()
