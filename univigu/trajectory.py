"""What a run leaves behind: its steps, and the files made from them.

A `Step` is one point on the walk through the unit square (tau_video, tau_text), with the state after it and the
model's guess of where the walk ends. A `Trajectory` is the walk as a whole; it becomes the small messages that the
viewer plays, and mp4, gif, JSON or one self-contained HTML page.
It knows nothing of the network, the sampler or Gradio.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image

from univigu.video import write_gif, write_video

Kind = Literal["clean", "noisy"]

FORMAT = "univigu-trajectory/1"

# A step travels to the page as one JPEG strip, so its pictures are thumbnails: a long side of 208 pixels keeps a
# 50-step run of Wan-sized clips under a few megabytes. The last step may be larger, it is looked at longest.
STRIP_LONG_SIDE, LAST_STRIP_LONG_SIDE = 208, 416
STRIP_FRAMES = 24
# The page compares steps by these thumbnails alone; colour counts, a red ball and a blue ball differ.
SIGNATURE_FRAMES, SIGNATURE_SIDE = 6, 8


@dataclass(kw_only=True)
class Step:
    """One step of the walk. Fields that the task does not have are None."""

    index: int
    total: int
    tau_video: float
    tau_text: float
    token_ids: np.ndarray | None = None  # argmax decode of the clean guess (equation 8), int64 (L,)
    token_confidence: np.ndarray | None = None  # float32 (L,), 0..1
    state_token_ids: np.ndarray | None = None  # argmax decode of the noisy state itself
    latents: torch.Tensor | None = None  # (1, C, F, H, W), the state after this step
    clean_latents: torch.Tensor | None = None  # the guess of the final clip
    token_state: torch.Tensor | None = None
    generator_state: torch.ByteTensor | None = None
    tokenizer: Any = field(default=None, repr=False)
    preview: Callable[[torch.Tensor], np.ndarray] | None = field(default=None, repr=False)
    final_frames: np.ndarray | None = field(default=None, repr=False)  # the fully decoded clip, where it is known

    @property
    def text(self) -> str | None:
        """The caption at this tau: the argmax decode up to its end, without special tokens."""
        return None if self.token_ids is None else _decode(self.token_ids, self.tokenizer)

    def tokens(self, kind: Kind = "clean") -> list[str]:
        """One display string per position; the end of the caption and what fills up after it are empty strings."""
        ids = self.token_ids if kind == "clean" else self.state_token_ids
        if ids is None:
            return []
        special = set(self.tokenizer.all_special_ids)
        shown: list[str] = []
        before: int | None = None
        for token in map(int, ids):
            if token in special:
                shown.append("")
                before = None
                continue
            # A tokenizer says only in context whether a token opens a word, so each is decoded after its neighbour.
            lead = [] if before is None else [before]
            shown.append(self.tokenizer.decode([*lead, token])[len(self.tokenizer.decode(lead)) :])
            before = token
        return shown

    def frames(self, kind: Kind = "clean") -> np.ndarray | None:
        """uint8 (F, H, W, 3) preview of the guess ("clean") or of the state itself ("noisy")."""
        if kind == "clean" and self.final_frames is not None:
            return self.final_frames
        latents = self.clean_latents if kind == "clean" else self.latents
        return None if latents is None or self.preview is None else self.preview(latents)


@dataclass(kw_only=True)
class Trajectory:
    """A run: what was asked for, every step, and the result. `settings` must be JSON-able."""

    task: str
    prompt: str | None
    seed: int | None
    settings: dict[str, Any]
    fps: float
    steps: list[Step] = field(default_factory=list)
    frames: np.ndarray | None = None
    text: str | None = None
    run: str = "run"  # tells runs apart where several are shown

    def message(self, step: Step) -> dict[str, Any]:
        """The step as the viewer takes it: small, JSON-able, and enough to scrub without asking a server."""
        last = step.index == step.total - 1
        clean = _thumbnails(step.frames("clean"), LAST_STRIP_LONG_SIDE if last else STRIP_LONG_SIDE)
        # On the edge tau_video = 1 the state is the clip itself, so there is no second picture to send.
        noisy = _thumbnails(step.frames("noisy"), STRIP_LONG_SIDE) if step.tau_video < 1 else None
        confidence = [] if step.token_confidence is None else np.round(step.token_confidence, 3).tolist()
        message: dict[str, Any] = {
            "run": self.run,
            "task": self.task,
            "prompt": self.prompt,
            "seed": self.seed,
            "settings": self.settings,
            "index": step.index,
            "total": step.total,
            "tau_video": round(float(step.tau_video), 4),
            "tau_text": round(float(step.tau_text), 4),
            "text": step.text,
            "token_ids": None if step.token_ids is None else step.token_ids.tolist(),
            "tokens": [list(pair) for pair in zip(step.tokens("clean"), confidence, strict=True)],
            "noisy_tokens": step.tokens("noisy"),
            "clean": None if clean is None else _strip(clean),
            "noisy": None if noisy is None else _strip(noisy, quality=60),  # noise costs bytes and needs no finesse
            "signature": None if clean is None else _signature(clean),
            "frame": None,
        }
        if clean is not None:
            count, height, width = clean.shape[:3]
            # Previews may have fewer frames than the clip; they are played in the time the clip takes.
            whole = self.settings.get("num_frames") or count
            message["frame"] = {
                "width": width,
                "height": height,
                "count": count,
                "fps": round(self.fps * count / whole, 3),
            }
        return message

    def messages(self) -> list[dict[str, Any]]:
        return [self.message(step) for step in self.steps]

    def to_json(self) -> str:
        """The run as JSON: what was asked for, the result, and each step with its tokens, times and pictures."""
        return saved_run(self.messages(), self.fps)

    def save(self, path: str | Path) -> None:
        """Write the run in the form its extension names: .html (page with the step slider), .json, .mp4 or .gif."""
        path = Path(path)
        extension = path.suffix.lower()
        if extension == ".html":
            path.write_text(page([self.messages()]), encoding="utf-8")
        elif extension == ".json":
            path.write_text(self.to_json(), encoding="utf-8")
        elif extension in (".mp4", ".gif"):
            if self.frames is None:
                raise ValueError(f"A {self.task} run has no clip to write as {extension}; save .html or .json instead.")
            # Small clips are enlarged by whole pixels: players smooth 64 x 64 into fog.
            scale = max(1, 256 // self.frames.shape[1])
            (write_video if extension == ".mp4" else write_gif)(path, self.frames, self.fps, scale=scale)
        else:
            raise ValueError(f"Cannot save a run as '{path.name}': the name must end in .html, .json, .mp4 or .gif.")


SHARED_BY_STEPS = ("task", "prompt", "seed", "settings")


def saved_run(messages: Sequence[dict[str, Any]], fps: float) -> str:
    """A run's viewer messages as the JSON that `Trajectory.save` writes and `read_messages` reads."""
    last = messages[-1]
    run = {
        "format": FORMAT,
        **{key: last[key] for key in SHARED_BY_STEPS},
        "fps": fps,
        "text": None if last["task"] == "generate" else last["text"],
        "steps": [{key: value for key, value in step.items() if key not in SHARED_BY_STEPS} for step in messages],
    }
    return json.dumps(run, ensure_ascii=False, indent=1)


def read_messages(text: str) -> list[dict[str, Any]]:
    """The viewer messages of a run that was saved as JSON."""
    run = json.loads(text)
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"This is not a saved run: its 'format' should be '{FORMAT}'.")
    return [{**step, **{key: run[key] for key in SHARED_BY_STEPS}} for step in run["steps"]]


def strip_frames(message: dict[str, Any]) -> np.ndarray | None:
    """The pictures of a viewer message as uint8 (F, H, W, 3), as the viewer shows them."""
    if message["clean"] is None:
        return None
    strip = Image.open(io.BytesIO(base64.b64decode(message["clean"].partition(",")[2])))
    return np.stack(np.split(np.asarray(strip), message["frame"]["count"], axis=1))


def page(runs: Sequence[list[dict[str, Any]]]) -> str:
    """One HTML page, playable without a network, that holds one run or two to compare, as viewer messages."""
    viewer = resources.files("univigu") / "ui" / "viewer"
    part = {name: (viewer / name).read_text(encoding="utf-8") for name in VIEWER_FILES}
    first = runs[0][0]
    title = html.escape(first["prompt"] or first["task"])
    # Inside <script> only "<" can end the element; json.dumps has already escaped everything that is not ASCII,
    # U+2028 and U+2029 among it.
    data = json.dumps([message for run in runs for message in run]).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title} · Uni-ViGU</title>
<style>{part["palette.css"]}{part["viewer.css"]}{part["page.css"]}</style>
</head>
<body>
<main>{part["viewer.html"]}</main>
<script type="application/json" id="univigu-runs">{data}</script>
<script>{part["viewer.js"]}{part["page.js"]}</script>
</body>
</html>
"""  # noqa: E501


VIEWER_FILES = ("palette.css", "viewer.css", "page.css", "viewer.html", "viewer.js", "page.js")


def _decode(ids: np.ndarray, tokenizer: Any) -> str:
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    kept = ids[: ends[0]] if len(ends) else ids
    return tokenizer.decode(kept.tolist(), skip_special_tokens=True).strip()


def _thumbnails(frames: np.ndarray | None, long_side: int) -> np.ndarray | None:
    """At most STRIP_FRAMES frames, evenly spread, none longer than `long_side`."""
    if frames is None:
        return None
    if len(frames) > STRIP_FRAMES:
        frames = frames[np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)]
    height, width = frames.shape[1:3]
    scale = long_side / max(height, width)
    return frames if scale >= 1 else _resized(frames, max(1, round(height * scale)), max(1, round(width * scale)))


def _resized(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])


def _strip(frames: np.ndarray, quality: int = 80) -> str:
    """All frames side by side as a JPEG data URI: 20 to 40 times cheaper to encode than WebP while sampling."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(buffer, "JPEG", quality=quality, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _signature(frames: np.ndarray) -> str:
    chosen = frames[np.linspace(0, len(frames) - 1, SIGNATURE_FRAMES).round().astype(int)]
    return base64.b64encode(_resized(chosen, SIGNATURE_SIDE, SIGNATURE_SIDE).tobytes()).decode("ascii")
