"""The typed endpoints /generate, /understand and /joint, for gradio_client, curl and, with the extra installed, MCP.

Each streams its steps as small JSON; the last one comes with the clip and the caption.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from univigu.trajectory import strip_frames
from univigu.ui import tab
from univigu.ui.runs import Ask, Run, Runs
from univigu.ui.view import clip_file
from univigu.video import read_video

SHOWN = ("index", "total", "tau_video", "tau_text", "text", "tokens")


def build(runs: Runs, model: str, config: Any) -> None:
    """Add the endpoints. They use the model the app was started with."""

    def follow(ask: Ask) -> Iterator[tuple[str | None, str | None, dict[str, Any]]]:
        run = runs.start(ask, config.default_fps)
        for message in tab.stream(runs, run.id):
            if "event" in message:
                break
            step = {key: message[key] for key in SHOWN}
            if message["index"] + 1 < message["total"]:
                yield None, message["text"], step
            else:
                # Gradio copies the file into its cache before it asks for more.
                with tempfile.TemporaryDirectory() as folder:
                    yield _clip(run, folder), message["text"], step

    def ask(task: str, prompt: str, seed: float, random_seed: bool, frames=None, **settings: Any) -> Ask:
        values = {"seed": seed, "random_seed": random_seed, **settings}
        return tab.make_ask(task, model, values, prompt=prompt, frames=frames)

    def generate(
        prompt: str,
        negative_prompt: str = "",
        steps: float = config.default_steps,
        guidance_scale: float = config.default_guidance_scale,
        seed: float = 0,
        random_seed: bool = False,
    ):
        """Make a short video clip from a text prompt. Streams the denoising steps; the last one has the clip.

        Args:
            prompt: What the clip should show.
            negative_prompt: What the clip should keep away from.
            steps: How many denoising steps to take, 1 to 100.
            guidance_scale: How closely to follow the prompt; 1 is not at all.
            seed: The same seed gives the same clip.
            random_seed: Ignore the seed and draw a new one.
        """
        options = {"num_inference_steps": int(steps), "guidance_scale": guidance_scale}
        options["negative_prompt"] = negative_prompt
        wish = ask("generate", tab.checked_prompt(prompt), seed, random_seed, **options)
        for clip, _, step in follow(wish):
            yield clip, step

    def understand(
        video: str,
        steps: float = config.default_steps,
        caption_guidance: float = config.default_caption_guidance,
        seed: float = 0,
        random_seed: bool = False,
    ):
        """Describe a short video clip in words. Streams the caption as it clears up.

        Args:
            video: The clip, a video file or a gif.
            steps: How many denoising steps to take, 1 to 100.
            caption_guidance: How closely to describe the clip; 1 is without guidance.
            seed: The same seed gives the same caption.
            random_seed: Ignore the seed and draw a new one.
        """
        if not video:
            raise tab.refusal("Please give a clip: a video file or a gif.")
        try:
            frames = read_video(video, config.default_num_frames, config.default_height, config.default_width).frames
        except ValueError as error:
            raise tab.refusal(error) from None
        options = {"num_inference_steps": int(steps), "caption_guidance": caption_guidance}
        for _, text, step in follow(ask("understand", "", seed, random_seed, frames, **options)):
            yield text, step

    def joint(
        prompt: str,
        negative_prompt: str = "",
        steps: float = config.default_steps,
        guidance_scale: float = config.default_guidance_scale,
        order: str = "together",
        seed: float = 0,
        random_seed: bool = False,
    ):
        """Make a short video clip and its detailed caption together from a text prompt. Streams the steps of both.

        Args:
            prompt: What the clip should show.
            negative_prompt: What the clip should keep away from.
            steps: How many denoising steps to take, 1 to 100.
            guidance_scale: How closely to follow the prompt; 1 is not at all.
            order: Which of the two clears up first: together, video_first or text_first.
            seed: The same seed gives the same clip and caption.
            random_seed: Ignore the seed and draw a new one.
        """
        options = {"num_inference_steps": int(steps), "guidance_scale": guidance_scale, "order": order}
        options["negative_prompt"] = negative_prompt
        yield from follow(ask("joint", tab.checked_prompt(prompt), seed, random_seed, **options))

    with gr.Column(visible=False):
        button = gr.Button()
        prompt, video = gr.Textbox(label="prompt"), gr.File(label="video", type="filepath")
        negative = gr.Textbox("", label="negative_prompt")
        steps = gr.Slider(1, tab.MAX_STEPS, config.default_steps, step=1, label="steps")
        guidance = gr.Number(config.default_guidance_scale, label="guidance_scale")
        caption_guidance = gr.Number(config.default_caption_guidance, label="caption_guidance")
        order = gr.Radio(list(tab.ORDER_NAMES), value="together", label="order")
        seed, random_seed = gr.Number(0, label="seed", precision=0), gr.Checkbox(False, label="random_seed")
        clip, caption, step = gr.Video(label="clip"), gr.Textbox(label="caption"), gr.JSON(label="step")
    seeds = [seed, random_seed]
    shared = {**tab.TURN, "api_visibility": "public"}
    button.click(generate, [prompt, negative, steps, guidance, *seeds], [clip, step], api_name="generate", **shared)
    button.click(understand, [video, steps, caption_guidance, *seeds], [caption, step], api_name="understand", **shared)
    inputs = [prompt, negative, steps, guidance, order, *seeds]
    button.click(joint, inputs, [clip, caption, step], api_name="joint", **shared)


def _clip(run: Run, folder: str) -> str | None:
    if strip_frames(run.last_message()) is None:
        return None
    path = Path(folder) / f"univigu-{run.ask.task}-{run.ask.seed}.mp4"
    path.write_bytes(clip_file(run, "mp4"))
    return str(path)
