"""The layout of a tab that starts from a prompt."""

from __future__ import annotations

import gradio as gr

from univigu.ui import models, tab
from univigu.ui.runs import Ask, Runs
from univigu.ui.view import trajectory_view


def prompted_tab(task: str, runs: Runs, model: gr.State, config, examples: list[str], button: str) -> dict:
    """Build the tab and return its fields by name, for a link to fill."""
    ticket = gr.State(None)
    with gr.Row():
        with gr.Column(scale=0, elem_classes="app-controls"):
            prompt = gr.Textbox(label="Prompt", placeholder="What should happen?", lines=2, max_lines=6)
            with gr.Row():
                run = gr.Button(button, variant="primary", min_width=150, elem_id=f"{task}-run")
                stop = gr.Button("Stop", min_width=80, scale=0, elem_id=f"{task}-stop")
            status = gr.HTML(" ", elem_classes="queue")
            chosen = gr.Dataset(
                components=[prompt], samples=[[example] for example in examples], label="Try one", samples_per_page=8
            )
            fields = tab.settings(task, config)
        with gr.Column(elem_classes="app-view"):
            example = f"example-{task}"
            value = {"run": example, "event": "example"} if example in runs else None
            view = trajectory_view(runs, value, elem_id=f"{task}-view")

    names = [name for name in fields if name != "size"]

    def begin(model: str, prompt: str, *values) -> Ask:
        pipe = models.pipeline(model)
        prompt = tab.checked_prompt(prompt, pipe)
        options = dict(zip(names, values, strict=True))
        tab.clip_size(options, pipe.config)
        return tab.make_ask(task, model, options, prompt=prompt)

    inputs = [model, prompt, *(fields[name] for name in names)]
    picked = chosen.click(lambda sample: sample[0], chosen, prompt, queue=False, show_progress="hidden", **tab.PRIVATE)
    tab.connect(
        runs,
        begin=begin,
        triggers=[run.click, prompt.submit],
        after=[picked],
        inputs=inputs,
        seed=fields["seed"],
        view=view,
        status=status,
        stop=stop,
        ticket=ticket,
    )
    return {"prompt": prompt, **fields}
