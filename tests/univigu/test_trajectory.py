"""A run's steps as messages, JSON, clips and a page of its own."""

from __future__ import annotations

import base64
import html.parser
import json

import av
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from univigu.trajectory import Step, Trajectory, page, read_messages, strip_frames


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.fit_previewer()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def joint(pipe) -> Trajectory:
    return pipe.joint("a red ball", seed=3, num_inference_steps=4, keep_trajectory=True).trajectory


def caption_step(pipe, caption: list[str], **fields) -> Step:
    ids = np.array([pipe.tokenizer.convert_tokens_to_ids(word) for word in caption])
    return Step(index=0, total=1, tau_video=1.0, tau_text=1.0, token_ids=ids, tokenizer=pipe.tokenizer, **fields)


def test_text_ends_where_the_caption_ends(pipe):
    step = caption_step(pipe, ["a", "red", "ball", ".", "</s>", "boat", "</s>"])
    assert step.text == "a red ball."
    assert "".join(step.tokens()[:4]) == "a red ball."
    assert step.tokens()[4:] == ["", "boat", ""]


def test_a_message_is_small_and_complete(joint):
    messages = [joint.message(step) for step in joint.steps]
    assert [message["index"] for message in messages] == [0, 1, 2, 3]
    assert messages[-1]["tau_video"] == messages[-1]["tau_text"] == 1
    for message in messages:
        assert len(json.dumps(message)) < 40_000  # and these pictures are pure noise
        assert len(message["tokens"]) == len(message["noisy_tokens"]) == len(message["token_ids"]) == 12
        assert all(0 <= confidence <= 1 for _, confidence in message["tokens"])
        assert message["frame"] == {"width": 32, "height": 32, "count": 9, "fps": 8.0}
        assert strip_frames(message).shape == (9, 32, 32, 3)
    assert messages[0]["noisy"] and messages[0]["noisy"] != messages[0]["clean"]
    assert messages[-1]["noisy"] is None  # there the state is the clip


def test_the_strip_shows_the_frames_in_order():
    frames = np.stack([np.full((16, 24, 3), 20 * index, np.uint8) for index in range(9)])
    step = Step(index=0, total=1, tau_video=1.0, tau_text=1.0, final_frames=frames)
    message = Trajectory(task="generate", prompt="", seed=0, settings={}, fps=8).message(step)
    np.testing.assert_allclose(strip_frames(message), frames, atol=3)


def test_large_clips_travel_as_thumbnails_in_the_same_time():
    frames = np.random.default_rng(0).integers(0, 255, (81, 120, 208, 3), np.uint8).repeat(2, 1).repeat(2, 2)
    step = Step(index=0, total=2, tau_video=1.0, tau_text=1.0, final_frames=frames)
    trajectory = Trajectory(task="generate", prompt="", seed=0, settings={"num_frames": 81}, fps=16)
    frame = trajectory.message(step)["frame"]
    assert (frame["width"], frame["height"], frame["count"]) == (208, 120, 24)
    assert frame["count"] / frame["fps"] == pytest.approx(81 / 16, rel=1e-3)


def test_signatures_measure_how_far_a_clip_is_from_its_end(joint):
    thumbnails = [np.frombuffer(base64.b64decode(m["signature"]), np.uint8).astype(float) for m in joint.messages()]
    distances = [np.sqrt(np.mean((thumbnail - thumbnails[-1]) ** 2)) for thumbnail in thumbnails]
    assert distances[0] > 1 and distances[-1] == 0


def test_json_holds_the_run_and_gives_its_messages_back(joint, tmp_path):
    joint.save(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    saved = json.loads(text)
    assert (saved["task"], saved["prompt"], saved["seed"], saved["text"]) == ("joint", "a red ball", 3, joint.text)
    assert saved["steps"][2]["token_ids"] == joint.steps[2].token_ids.tolist()
    assert read_messages(text) == joint.messages()


def test_json_of_something_else_is_refused():
    with pytest.raises(ValueError, match="not a saved run"):
        read_messages('{"steps": []}')


def test_clips_are_written_and_enlarged_by_whole_pixels(joint, tmp_path):
    joint.save(tmp_path / "clip.mp4")
    with av.open(tmp_path / "clip.mp4") as file:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in file.decode(video=0)]
    assert shapes == [(256, 256, 3)] * 9
    joint.save(tmp_path / "clip.gif")
    with Image.open(tmp_path / "clip.gif") as gif:
        assert (gif.n_frames, gif.size) == (9, (256, 256))


def test_other_extensions_are_refused(joint, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.html, \.json, \.mp4 or \.gif"):
        joint.save(tmp_path / "run.exe")
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_clip_says_so(tmp_path):
    trajectory = Trajectory(task="understand", prompt="", seed=0, settings={}, fps=8)
    with pytest.raises(ValueError, match="has no clip"):
        trajectory.save(tmp_path / "clip.mp4")


class Reader(html.parser.HTMLParser):
    """What a browser would take from the page: its tags, and the text of each kind of element."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self.inside = ""

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


def test_the_page_is_whole_and_keeps_user_text_out_of_its_markup(joint, tmp_path):
    wicked = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\u2028 ’RTL \u202e'
    trajectory = Trajectory(
        task="joint", prompt=wicked, seed=1, settings={}, fps=8, steps=joint.steps, frames=joint.frames, text=joint.text
    )
    trajectory.save(tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert [tag for tag, _ in reader.tags].count("script") == 2  # the data and the player
    assert not [tag for tag, _ in reader.tags if tag == "img"]
    assert reader.texts["title"].startswith(wicked)
    assert "\u2028" not in text.partition('id="univigu-runs">')[2].partition("</script>")[0]
    assert not [value for _, attributes in reader.tags for value in attributes.values() if value and "//" in value]


def test_a_page_can_hold_two_runs(joint):
    other = [{**message, "run": "other"} for message in joint.messages()]
    text = page([joint.messages(), other])
    data = json.loads(text.partition('id="univigu-runs">')[2].partition("</script>")[0])
    assert [message["run"] for message in data] == ["run"] * 4 + ["other"] * 4
