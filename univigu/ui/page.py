"""The page: header, three tabs, the model chooser, links that reopen a run, and how it is served."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import gradio as gr

from univigu.trajectory import read_messages
from univigu.ui import api, generate, joint, models, tab, theme, understand
from univigu.ui.runs import Runs

EXAMPLES = Path(__file__).resolve().parents[2] / "assets" / "examples"
TITLE = """<div class="app-title"><h1>Uni-ViGU</h1>
<p>One model makes a <span class="v">clip</span> and its <span class="t">caption</span> out of noise, both at once.
Run it, then drag the slider to see how each shaped the other.</p></div>"""


def build(model_name: str, device: str | None = None, examples: Path = EXAMPLES) -> gr.Blocks:
    """The app, with its first model loaded. `examples` holds clips to offer and, for each task, a saved run to show
    before anything was run (`python -m univigu joint … --save-trajectory assets/examples/joint.json`)."""
    config = models.prepare(model_name, device).config
    runs = Runs()
    for task in ("generate", "understand", "joint"):
        saved = examples / f"{task}.json"
        if saved.is_file():
            runs.add_example(task, read_messages(saved.read_text(encoding="utf-8")))
    gr.set_static_paths([examples])

    with gr.Blocks(title="Uni-ViGU", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        title = gr.HTML(TITLE)
        model = gr.State(model_name)
        with gr.Tabs(selected="joint") as tabs:
            with gr.Tab("Generate", id="generate"):
                fields = {"generate": generate.build(runs, model, config)}
            with gr.Tab("Understand", id="understand"):
                clips = sorted(path for path in examples.glob("*.mp4"))
                fields["understand"] = understand.build(runs, model, config, clips)
            with gr.Tab("Joint", id="joint"):
                fields["joint"] = joint.build(runs, model, config)
        # Visitors of a shared Space use the model it was started with; what is merely hidden could still be called.
        if "SPACE_ID" not in os.environ:
            with gr.Accordion("Model", open=False):
                _model_chooser(model, model_name, fields)
        api.build(runs, model_name, config)
        # What an event once showed progress on, even hidden, Gradio's page copies with all it holds at every message of
        # any event, so at each step of a run. Of `tabs` that would be the whole page; the title is a line.
        opening = {"queue": False, "show_progress": "hidden", "show_progress_on": title, **tab.PRIVATE}
        demo.load(_open_tab, None, tabs, **opening)
        for task, named in fields.items():
            _open_link(demo, task, named, opening)
    demo.queue(max_size=20, default_concurrency_limit=1)
    # Gradio looks a thousand times a second whether somebody waits, and each look interrupts the step being taken. To
    # look less often makes a run of 30 steps 5 % shorter, and an idle server nearly free.
    demo._queue.sleep_when_free = 0.02
    demo._queue.progress_update_sleep_when_free = 0.1
    return demo


def launch_options() -> dict[str, Any]:
    """How the page is served: without server-side rendering, a history of runs or a request to anyone else."""
    return {
        "theme": theme.theme(),
        "css": theme.CSS,
        "ssr_mode": False,
        "run_history": False,
        "share": False,
        "max_file_size": "20mb",
        "footer_links": ["api"],
        "state_session_capacity": 1000,
        "mcp_server": importlib.util.find_spec("mcp") is not None,
    }


def _model_chooser(model: gr.State, model_name: str, fields: dict[str, dict]) -> None:
    known = {name: label for label, name in models.CHOICES.items()}
    with gr.Row(equal_height=True):
        choice = gr.Dropdown(
            list(models.CHOICES.items()),
            value=model_name,
            allow_custom_value=True,
            label="Model",
            info="One of these, or any folder or Hub id of a Uni-ViGU or Wan2.1 pipeline",
            scale=4,
        )
        load = gr.Button("Load", scale=0, min_width=100)
    status = gr.Markdown(f"Loaded: {known.get(model_name, 'the model given at the start')}")
    changing = ("num_inference_steps", "guidance_scale", "caption_guidance", "num_frames", "height", "width", "size")
    outputs = [named[name] for named in fields.values() for name in changing if name in named]

    def change(name: str):
        try:
            config = models.pipeline((name or "").strip()).config
        except ValueError as error:
            raise tab.refusal(error) from None
        values = {
            "num_inference_steps": config.default_steps,
            "guidance_scale": config.default_guidance_scale,
            "caption_guidance": config.default_caption_guidance,
            "size": gr.Row(visible=tab.sizes_are_free(config)),
            **{key: config[f"default_{key}"] for key in ("num_frames", "height", "width")},
        }
        updates = [values[key] for named in fields.values() for key in changing if key in named]
        return name.strip(), "Loaded: this model is ready.", *updates

    load.click(change, choice, [model, status, *outputs], show_progress_on=status, **tab.TURN, **tab.PRIVATE)


def _open_tab(request: gr.Request):
    task = request.query_params.get("task")
    # Without a link nothing is said: by the time this arrives somebody may have opened a tab already.
    return gr.Tabs(selected=task) if task in ("generate", "understand", "joint") else gr.skip()


def _open_link(demo: gr.Blocks, task: str, fields: dict[str, gr.components.Component], options: dict[str, Any]) -> None:
    """Fill a tab from a link's query; what the link does not name keeps its default."""
    named = {name: field for name, field in fields.items() if name != "size"}

    def fill(request: gr.Request):
        query = dict(request.query_params)
        if query.get("task") != task:
            return [gr.skip()] * len(named)
        updates = []
        for name, field in named.items():
            value: Any = query.get(name)
            if name == "random_seed":
                value = False if "seed" in query else None
            elif value is not None and isinstance(field, gr.Number | gr.Slider):
                try:
                    value = float(value) if name.endswith(("scale", "guidance")) else int(value)
                    if not (field.minimum or 0) <= value <= (field.maximum or 2**31):
                        raise ValueError
                except ValueError:
                    gr.Warning(f"The link's {name.replace('_', ' ')} cannot be used here; it keeps its default.")
                    value = None
            elif value is not None and isinstance(field, gr.Radio | gr.Dropdown):
                value = value if value in [choice[1] for choice in field.choices] else None
            updates.append(gr.skip() if value is None else value)
        return updates

    demo.load(fill, None, list(named.values()), **options)
