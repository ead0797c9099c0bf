"""What the three tabs share: settings, and the way from a button to a streamed run.

A button first checks what was typed and registers the run (at once, waiting for no other run), then the run waits for
its turn and streams one small message a step. A ticket, the run's id, links the two.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from univigu.sampler import ORDERS, VIDEO_SCHEDULERS
from univigu.ui import models
from univigu.ui.runs import Ask, Runs

MAX_PROMPT_LETTERS = 10_000
MAX_STEPS = 100
LARGEST = 4  # a clip may have this many times the pixels of a model's own, so that no visitor takes all the memory
ORDER_NAMES = {"together": "together", "video_first": "clip first", "text_first": "caption first"}
SCHEDULER_NAMES = ("Euler", "Euler, new noise every step", "UniPC", "DPM-Solver++", "DPM-Solver++, stochastic")
# Runs wait in one line; two at a time take turns step by step, so that a short one need not wait for a long one.
TURN = {"concurrency_id": "model", "concurrency_limit": 2}
PRIVATE = {"api_visibility": "private"}


def settings(task: str, config: Any) -> dict[str, gr.components.Component]:
    """The folded-away settings of a task, by the name that `UniViGUPipeline.stream` gives them."""
    fields: dict[str, gr.components.Component] = {}
    with gr.Row(equal_height=True):
        fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=110)
        fields["random_seed"] = gr.Checkbox(True, label="Random", min_width=110)
    with gr.Accordion("Settings", open=False):
        fields["num_inference_steps"] = gr.Slider(1, MAX_STEPS, config.default_steps, step=1, label="Steps")
        if task != "understand":
            fields["guidance_scale"] = gr.Slider(
                1, 15, config.default_guidance_scale, step=0.1, label="Guidance", info="How close to the prompt"
            )
            fields["negative_prompt"] = gr.Textbox("", label="Negative prompt", placeholder="What to keep away from")
        if task != "generate":
            fields["caption_guidance"] = gr.Slider(
                1, 8, config.default_caption_guidance, step=0.1, label="Caption guidance", info="How close to the clip"
            )
        if task == "joint":
            choices = [(ORDER_NAMES[order], order) for order in ORDERS]
            fields["order"] = gr.Radio(choices, value="together", label="Path", info="Which of the two clears up first")
        if task != "understand":
            choices = [("The model's own", "own"), *zip(SCHEDULER_NAMES, VIDEO_SCHEDULERS, strict=True)]
            fields["scheduler"] = gr.Dropdown(choices, value="own", label="Scheduler")
        # The small model knows one size of clip; Wan knows many.
        with gr.Row(visible=sizes_are_free(config)) as size:
            for name, label, step in (("num_frames", "Frames", 4), ("height", "Height", 16), ("width", "Width", 16)):
                value = config[f"default_{name}"]
                fields[name] = gr.Number(value, label=label, precision=0, step=step, min_width=80)
        fields["size"] = size
    return fields


def sizes_are_free(config: Any) -> bool:
    return config.default_height > 64


def refusal(sentence: str | Exception) -> gr.Error:
    """One friendly sentence in the page; nothing in the log, since it is no fault of ours."""
    return gr.Error(str(sentence), print_exception=False, title="That did not work")


def checked_prompt(prompt: str | None, pipe: Any = None) -> str:
    """The prompt, or one sentence about what is wrong with it; a note where its end will not be read."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise refusal("Please write a prompt first, for example “a red ball bounces over a meadow”.")
    if len(prompt) > MAX_PROMPT_LETTERS:
        raise refusal(f"This prompt has {len(prompt):,} letters; please keep it under {MAX_PROMPT_LETTERS:,}.")
    if pipe is not None and (cut := pipe.cut_from_prompt(prompt)):
        gr.Info(f"The prompt is longer than the model reads; it will not see the end, from “{cut[:40]}…” on.")
    return prompt


def clip_size(values: dict[str, Any], config: Any) -> list[int]:
    """Frames, height and width that the fields ask for; links and clients may ask for more than the fields offer."""
    names = ("num_frames", "height", "width")
    default = [config[f"default_{name}"] for name in names]
    size = [values.get(name) or value for name, value in zip(names, default, strict=True)]
    if size != default and not sizes_are_free(config):
        raise refusal("This model makes clips of {} frames, {} x {} pixels, and no others.".format(*default))
    if math.prod(size) > LARGEST * math.prod(default):
        raise refusal(f"A clip of {size[0]} frames, {size[1]} x {size[2]} pixels, is more than this app makes at once.")
    return size


def make_ask(task: str, model: str, values: dict[str, Any], **more: Any) -> Ask:
    """An `Ask` from the values of a tab's fields."""
    values = dict(values)
    random_seed, seed = values.pop("random_seed", False), values.pop("seed", None)
    values.pop("size", None)
    for name in ("num_frames", "height", "width", "num_inference_steps"):
        if values.get(name) is None:
            values.pop(name, None)
    if not random_seed and seed is None:
        raise refusal("Please write a seed, or tick “Random”.")
    seed = secrets.randbelow(2**31) if random_seed else int(seed)
    return Ask(model=model, task=task, seed=seed, settings={"scheduler": "own", **values}, **more)


def stream(runs: Runs, ticket: str) -> Iterator[dict[str, Any]]:
    """One message a step. Ends where the run ends, is stopped, or its page is closed."""
    run = runs.get(ticket)
    ask = run.ask
    parent = runs.get(ask.parent) if ask.parent else None
    more = {"kept": True, "beside": ask.beside, "parent": ask.parent, "branch_at": ask.branch_at}
    steps = models.steps(run, parent)
    finished = False
    try:
        for message, state in steps if not run.stop else ():
            message = {**message, **more}
            run.steps.add(message, state)
            finished = message["index"] == message["total"] - 1
            yield message
            if run.stop:
                break
    except ValueError as error:
        raise refusal(error) from None
    finally:
        steps.close()
        run.event = "done" if finished else "stopped"
    yield {"run": run.id, "event": run.event}


def connect(
    runs: Runs,
    *,
    begin: Callable[..., Ask],
    triggers: list[Callable],
    after: list[Any],
    inputs: list[gr.components.Component],
    seed: gr.Number,
    view: gr.HTML,
    status: gr.HTML,
    stop: gr.Button,
    ticket: gr.State,
) -> None:
    """Wire a tab: its triggers, and what follows on an event of `after`, start what `begin` makes of the inputs; the
    viewer's events branch and compare."""

    def register(ask: Ask, previous: str | None) -> str:
        halt(previous)  # a visitor's new run takes the place of the one before
        return runs.start(ask, models.pipeline(ask.model).config.default_fps).id

    def halt(current: str | None) -> None:
        if current and current in runs:
            runs.get(current).stop = True

    def start(previous, *values):
        ask = begin(*values)
        return register(ask, previous), ask.seed

    def branch(previous, event: gr.EventData):
        wish = event._data
        try:
            run = runs.get(str(wish["run"]))
            state = models.state_at(run, int(wish["step"]))
            if state["index"] + 1 >= state["total"]:
                raise ValueError("This is the last step, there is nothing left to run; pick an earlier one.")
        except (ValueError, KeyError, TypeError) as error:
            raise refusal(error) from None
        ask = run.ask
        prompt = ask.prompt if ask.task == "understand" else checked_prompt(str(wish.get("prompt") or ""))
        changed = {
            **vars(ask),
            "prompt": prompt,
            "parent": run.id,
            "branch_at": state["index"],
            "caption": None if wish.get("caption") is None else str(wish["caption"])[:MAX_PROMPT_LETTERS],
            "pin_caption": bool(wish.get("pin")),
            "beside": run.id,
        }
        return register(Ask(**changed), previous)

    def another(previous, event: gr.EventData):
        try:
            run = runs.get(str(event._data["run"]))
        except (ValueError, KeyError, TypeError) as error:
            raise refusal(error) from None
        fresh = {"seed": secrets.randbelow(2**31), "beside": run.id, "parent": None, "branch_at": None, "caption": None}
        return register(Ask(**{**vars(run.ask), **fresh}), previous)

    def told(current: str) -> Iterator[str]:
        with contextlib.closing(stream(runs, current)) as messages:
            for message in messages:
                yield json.dumps(message)

    def follow(event) -> None:
        event.success(
            told,
            ticket,
            view,
            show_progress="minimal",
            show_progress_on=status,
            **TURN,
            **PRIVATE,
        )

    # In the queue, though never waiting in it: outside of it a refusal would be a server error to the browser.
    at_once = {"concurrency_limit": None, "show_progress": "hidden", "show_progress_on": status, **PRIVATE}
    follow(gr.on(triggers, start, [ticket, *inputs], [ticket, seed], **at_once))
    for event in after:
        follow(event.success(start, [ticket, *inputs], [ticket, seed], **at_once))
    follow(view.branch(branch, ticket, ticket, **at_once))
    follow(view.another(another, ticket, ticket, **at_once))
    stop.click(halt, ticket, None, queue=False, show_progress="hidden", **PRIVATE)
