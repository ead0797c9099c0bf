"""The Understand tab: a clip becomes a caption (equation 16)."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from univigu.ui import models, tab
from univigu.ui.runs import Ask, Runs
from univigu.ui.view import trajectory_view
from univigu.video import probe, read_video

LONG_CLIP_SECONDS = 30


def build(runs: Runs, model: gr.State, config, clips: list[Path]) -> dict:
    ticket = gr.State(None)
    with gr.Row():
        with gr.Column(scale=0, elem_classes="app-controls"):
            clip = gr.File(
                label="Clip", file_types=["video", ".gif"], type="filepath", height=130, elem_id="understand-clip"
            )
            with gr.Accordion("Record one instead", open=False):
                record = gr.Video(
                    sources=["webcam"],
                    label="Webcam",
                    include_audio=True,
                    webcam_options=gr.WebcamOptions(mirror=False),
                    height=220,
                )
            with gr.Row():
                run = gr.Button("Describe", variant="primary", min_width=150, elem_id="understand-run")
                stop = gr.Button("Stop", min_width=80, scale=0, elem_id="understand-stop")
            status = gr.HTML(" ", elem_classes="queue")
            chosen = gr.Dataset(
                components=[gr.Video(visible=False)],
                samples=[[str(path)] for path in clips],
                sample_labels=[path.stem.replace("-", " ") for path in clips],
                label="Try one",
                visible=bool(clips),
                type="index",
            )
            fields = tab.settings("understand", config)
            with gr.Accordion("Part of the clip", open=False), gr.Row():
                first = gr.Number(0, label="From second", minimum=0, min_width=100)
                last = gr.Number(None, label="To second", minimum=0, min_width=100)
        with gr.Column(elem_classes="app-view"):
            value = {"run": "example-understand", "event": "example"} if "example-understand" in runs else None
            view = trajectory_view(runs, value, elem_id="understand-view")

    names = [name for name in fields if name != "size"]

    def begin(model: str, path: str | None, first: float | None, last: float | None, *values) -> Ask:
        if not path:
            raise tab.refusal("Please choose a clip first: drop a file, record one, or pick an example.")
        config = models.pipeline(model).config
        options = dict(zip(names, values, strict=True))
        size = tab.clip_size(options, config)
        try:
            info = probe(path)
            frames = read_video(path, *size, start=first or 0, end=last).frames
        except ValueError as error:
            raise tab.refusal(error) from None
        if info.num_frames == 1:
            gr.Info("This clip has a single frame, so the model will see nothing move.")
        elif (last or info.duration) - (first or 0) > LONG_CLIP_SECONDS:
            gr.Info(f"The model sees {size[0]} frames spread over this long clip; “Part of the clip” narrows it.")
        return tab.make_ask("understand", model, options, prompt="", frames=frames)

    at_once = {"queue": False, "show_progress": "hidden", **tab.PRIVATE}
    recorded = record.stop_recording(lambda path: path, record, clip, **at_once)
    picked = chosen.click(lambda index: str(clips[index]), chosen, clip, **at_once)
    tab.connect(
        runs,
        begin=begin,
        triggers=[run.click],
        after=[picked, recorded],
        inputs=[model, clip, first, last, *(fields[name] for name in names)],
        seed=fields["seed"],
        view=view,
        status=status,
        stop=stop,
        ticket=ticket,
    )
    return fields
