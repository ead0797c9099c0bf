"""The app as a client sees it: typed endpoints that stream, friendly refusals, runs that end when nobody waits."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

import base64
import json
import urllib.request
from fractions import Fraction
from pathlib import Path

import av
import gradio
import numpy as np
import pytest
import yaml
from diffusers.configuration_utils import FrozenDict
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from serving import served, tiny_model

from univigu.trajectory import page
from univigu.ui import models, tab, view
from univigu.ui.runs import KEPT_RUNS, Ask, Runs, Steps
from univigu.video import probe, write_gif, write_video

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    with served(model) as url:
        client = Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))
        yield client
        client.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    frames = np.stack([np.full((48, 64, 3), 20 * index, np.uint8) for index in range(12)])
    write_video(path, frames, 8)
    return str(path)


def num_frames(path: str) -> int:
    with av.open(path) as file:
        return sum(1 for _ in file.decode(video=0))


def test_the_api_is_three_typed_endpoints(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert sorted(endpoints) == ["/generate", "/joint", "/understand"]
    types = {p["parameter_name"]: p["python_type"]["type"] for p in endpoints["/joint"]["parameters"]}
    assert types["prompt"] == "str" and types["seed"] == "int" and types["random_seed"] == "bool"
    assert "Literal" in types["order"]
    required = [p["parameter_name"] for p in endpoints["/generate"]["parameters"] if not p["parameter_has_default"]]
    assert required == ["prompt"]


def test_joint_streams_its_steps_and_ends_with_clip_and_caption(client):
    job = client.submit("a red ball", steps=5, seed=3, api_name="/joint")
    clip, caption, step = job.result()
    outputs = job.outputs()
    assert [output[2]["index"] for output in outputs] == [0, 1, 2, 3, 4]
    assert [output[0] for output in outputs[:-1]] == [None] * 4
    assert step["tau_video"] == step["tau_text"] == 1
    assert caption == step["text"]
    assert num_frames(clip["video"] if isinstance(clip, dict) else clip) == 9


def test_the_same_seed_gives_the_same_result(client):
    first, again, other = (client.predict("a blue boat", steps=3, seed=s, api_name="/joint")[2] for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_the_page_and_python_agree(client, model):
    caption = client.predict("a blue boat", steps=3, seed=5, api_name="/joint")[1]
    assert caption == models.pipeline(model).joint("a blue boat", num_inference_steps=3, seed=5).text


def test_generate_and_understand(client, clip):
    made, step = client.predict("a green star", steps=2, api_name="/generate")
    assert num_frames(made["video"] if isinstance(made, dict) else made) == 9
    assert (step["index"], step["total"]) == (1, 2)
    text, step = client.predict(handle_file(clip), steps=3, api_name="/understand")
    assert text == step["text"] and step["tau_video"] == 1


def test_curl_can_use_it(client):
    body = json.dumps({"data": ["a red ball", "", 2, 2.0, "together", 1, False]}).encode()
    address = client.src.rstrip("/") + "/gradio_api/call/joint"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    stream = urllib.request.urlopen(f"{address}/{event}").read().decode()
    assert stream.count("event: generating") == 2
    assert stream.rstrip().rpartition("event: ")[2].startswith("complete")


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("", "write a prompt"), ("   \n", "write a prompt"), ("red " * 2501, "under 10,000")],
    ids=["empty", "blank", "too long"],
)
def test_prompts_that_are_refused(client, prompt, sentence):
    with pytest.raises(AppError, match=sentence):
        client.predict(prompt, api_name="/generate")


@pytest.mark.parametrize(
    "prompt",
    ["🎈🎈🎈", "كرة حمراء تقفز", "<script>alert(1)</script>", "red " * 2400],
    ids=["emoji", "rtl", "script", "long"],
)
def test_prompts_that_are_taken(client, prompt):
    assert client.predict(prompt, steps=1, api_name="/joint")[2]["index"] == 0


def bad_clips(folder, clip):
    text = folder / "text.mp4"
    text.write_text("this is no video")
    cut = folder / "cut.mp4"
    cut.write_bytes(Path(clip).read_bytes()[:200])
    empty = folder / "empty.mp4"
    empty.touch()
    return text, cut, empty


def test_clips_that_are_refused(client, clip, tmp_path):
    for path in bad_clips(tmp_path, clip):
        with pytest.raises(AppError) as refused:
            client.predict(handle_file(str(path)), steps=1, api_name="/understand")
        sentence = str(refused.value)
        assert path.name in sentence and "Traceback" not in sentence and sentence.count("\n") == 0, sentence


def two_hours(path: Path) -> None:
    """One small picture every ten seconds."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=1)
        stream.width = stream.height = 64
        stream.codec_context.time_base = Fraction(1, 1)
        for second in range(0, 7200, 10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), second // 30, np.uint8))
            frame.pts, frame.time_base = second, Fraction(1, 1)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def test_unusual_clips_that_are_taken(client, tmp_path):
    large = np.zeros((5, 2160, 3840, 3), np.uint8)
    write_video(tmp_path / "large.mp4", large, 8)
    two_hours(tmp_path / "long.mp4")
    assert probe(tmp_path / "long.mp4").duration > 7000
    write_gif(tmp_path / "moving.gif", large[:, :64, :64], 8)
    write_video(tmp_path / "still.mp4", large[:1, :64, :64], 8)
    for name in ("large.mp4", "long.mp4", "moving.gif", "still.mp4"):
        text, _ = client.predict(handle_file(str(tmp_path / name)), steps=1, api_name="/understand")
        assert isinstance(text, str)


def test_settings_that_cannot_be(client):
    with pytest.raises(AppError):
        client.predict("a red ball", steps=101, api_name="/generate")
    with pytest.raises(AppError):
        client.predict("a red ball", order="backwards", api_name="/joint")


def test_a_cancelled_run_stops_working(client):
    job = client.submit("a red ball", steps=100, api_name="/joint")
    next(iter(job))
    job.cancel()
    # the next run only gets a turn to finish if the model is not held any longer
    assert client.predict("a blue boat", steps=2, api_name="/joint")[2]["index"] == 1
    assert len(job.outputs()) < 100


def test_a_file_over_the_limit_is_refused(client, tmp_path):
    with (tmp_path / "huge.mp4").open("wb") as file:
        file.truncate(21 * 2**20)
    with pytest.raises(Exception, match=r"(?i)size|large|413"):
        client.predict(handle_file(str(tmp_path / "huge.mp4")), api_name="/understand")


def test_a_page_that_is_closed_frees_its_work(client, model):
    taken = []
    hook = models.pipeline(model).transformer.register_forward_hook(lambda *_: taken.append(1))
    client.predict("a red ball", steps=10, api_name="/joint")
    each = len(taken) / 10
    taken.clear()
    address = client.src.rstrip("/") + "/gradio_api/queue/"
    event = next(e for e in client.config["dependencies"] if e["api_name"] == "joint")
    wish = {"data": ["a red ball", "", 100, 2.0, "together", 1, False], "fn_index": event["id"], "session_hash": "page"}
    request = urllib.request.Request(address + "join", json.dumps(wish).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(address + "data?session_hash=page") as stream:
        next(line for line in stream if b"process_generating" in line)
    # Runs take turns, so a run that went on would have its hundred steps done when this one has.
    client.predict("a blue boat", steps=100, api_name="/joint")
    hook.remove()
    assert 100 * each < len(taken) < 190 * each


def test_a_saved_run_is_there_before_the_first_one(model, clip, tmp_path):
    pipe = models.prepare(model, "cpu")
    pipe.understand(clip, num_inference_steps=3, seed=1, keep_trajectory=True).trajectory.save(
        tmp_path / "understand.json"
    )
    with served(model, tmp_path) as url:
        components = json.load(urllib.request.urlopen(url + "config"))["components"]
    views = [c["props"] for c in components if str(c["props"].get("elem_id")).endswith("-view")]
    values = {props["elem_id"]: json.loads(props["value"]) for props in views}
    assert values["understand-view"] == {"run": "example-understand", "event": "example"}
    assert values["joint-view"] is None


def test_the_readme_is_a_space_card():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    card = yaml.safe_load(text.split("---")[1])
    assert card["sdk"] == "gradio" and card["sdk_version"] == gradio.__version__
    assert f"gradio=={gradio.__version__}" in (ROOT / "requirements.txt").read_text().splitlines()
    assert (ROOT / card["app_file"]).is_file()
    assert card["python_version"] in ("3.12.12", "3.10.13")
    assert len(card["short_description"]) <= 60
    assert {card["colorFrom"], card["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }


def test_a_clip_larger_than_the_model_makes_is_refused(model):
    config = models.pipeline(model).config
    assert tab.clip_size({}, config) == tab.clip_size({"num_frames": 9}, config) == [9, 32, 32]
    with pytest.raises(gradio.Error, match="and no others"):
        tab.clip_size({"num_frames": 100_001}, config)
    free = FrozenDict({**config, "default_height": 480, "default_width": 832})
    assert tab.clip_size({"num_frames": 17}, free) == [17, 480, 832]
    with pytest.raises(gradio.Error, match="more than this app makes"):
        tab.clip_size({"num_frames": 100_001}, free)


# ---------------------------------------------------------------------------------------- runs, branches, closer looks


@pytest.fixture(scope="module")
def runs(model) -> Runs:
    models.pipeline(model)
    return Runs()


def run_of(runs: Runs, model: str, **fields):
    settings = {"num_inference_steps": 4, "scheduler": "euler"}
    ask = Ask(**{"model": model, "task": "joint", "prompt": "a red ball", "seed": 3, "settings": settings, **fields})
    run = runs.start(ask, 8)
    return run, list(tab.stream(runs, run.id))


def test_a_run_ends_with_an_event_and_is_kept(runs, model):
    run, messages = run_of(runs, model)
    assert [message.get("index") for message in messages] == [0, 1, 2, 3, None]
    assert messages[-1] == {"run": run.id, "event": "done"}
    assert view.steps(runs, {"run": run.id, "have": [0, 2]}) == [messages[1], messages[3], messages[4]]
    json.dumps(messages)


def test_a_branch_goes_on_as_its_parent_did_unless_something_is_changed(runs, model):
    parent, before = run_of(runs, model)
    _, same = run_of(runs, model, parent=parent.id, branch_at=1, beside=parent.id)
    assert [message.get("index") for message in same] == [2, 3, None]
    assert [m["token_ids"] for m in same[:-1]] == [m["token_ids"] for m in before[2:-1]]
    assert same[-2]["clean"] == before[-2]["clean"]
    changed, other = run_of(runs, model, parent=parent.id, branch_at=1, prompt="a blue boat")
    assert other[-2]["clean"] != before[-2]["clean"]
    whole = runs.messages(changed)
    assert [message["index"] for message in whole] == [0, 1, 2, 3]
    assert whole[:2] == before[:2]


def test_a_held_caption_stays_to_the_end(runs, model):
    parent, _ = run_of(runs, model)
    _, held = run_of(runs, model, parent=parent.id, branch_at=0, caption="a small green star", pin_caption=True)
    assert {message["text"] for message in held[:-1]} == {"a small green star"}


def test_a_stopped_run_keeps_what_is_there(runs, model):
    ask = Ask(model=model, task="joint", prompt="a", seed=0, settings={"num_inference_steps": 50, "scheduler": "euler"})
    run = runs.start(ask, 8)
    stream = tab.stream(runs, run.id)
    next(stream), next(stream)
    run.stop = True
    assert list(stream) == [{"run": run.id, "event": "stopped"}]
    assert len(run.steps) == 2
    taken = view.take(runs, {"runs": [run.id], "kind": "mp4"})
    assert taken["name"] == "univigu-joint-0.mp4" and len(taken["data"]) > 500


def test_a_run_stopped_while_it_waits_takes_no_step(runs, model):
    run = runs.start(Ask(model=model, task="joint", prompt="a", seed=0, settings={"scheduler": "euler"}), 8)
    run.stop = True
    assert list(tab.stream(runs, run.id)) == [{"run": run.id, "event": "stopped"}]


def test_a_closed_page_ends_its_run(runs, model):
    ask = Ask(model=model, task="joint", prompt="a", seed=0, settings={"num_inference_steps": 50, "scheduler": "euler"})
    run = runs.start(ask, 8)
    stream = tab.stream(runs, run.id)
    next(stream)
    stream.close()
    assert run.event == "stopped" and len(run.steps) == 1


def test_a_word_can_be_looked_at_more_closely(runs, model):
    run, _ = run_of(runs, model)
    request = json.loads(json.dumps({"run": run.id, "step": 1, "token": 2}))
    answer = view.attend(runs, request)
    assert (answer["count"], answer["height"], answer["width"]) == (9, 32, 32)
    assert json.loads(json.dumps(answer)) == answer


def test_files_to_take_away(runs, model):
    run, messages = run_of(runs, model)
    branch, _ = run_of(runs, model, parent=run.id, branch_at=1, prompt="a blue boat")

    def taken(kind, *shown):
        return base64.b64decode(view.take(runs, {"runs": list(shown), "kind": kind})["data"])

    assert taken("txt", run.id).decode() == messages[3]["text"]
    assert [step["index"] for step in json.loads(taken("json", branch.id))["steps"]] == [0, 1, 2, 3]
    assert taken("gif", run.id).startswith(b"GIF8")
    assert taken("html", run.id, branch.id).decode().count(run.id) >= 4
    assert taken("html", run.id).decode().startswith(page([messages[:1]])[:60])


@pytest.mark.parametrize(
    "request_",
    [
        {"runs": ["../../etc/passwd"], "kind": "mp4"},
        {"runs": [], "kind": "mp4"},
        {"runs": [None], "kind": "mp4"},
        {"kind": "exe", "runs": ["a"]},
        {},
        None,
        ["a"],
    ],
)
def test_requests_that_make_no_sense_are_answered_with_a_sentence(request_):
    component = view.trajectory_view(Runs())
    for name in ("take", "attend"):
        assert isinstance(getattr(component, name)(request_)["error"], str)


def test_a_saved_example_has_no_step_to_go_on_from(runs, model):
    _, messages = run_of(runs, model)
    runs.add_example("joint", messages[:-1])
    example = runs.get("example-joint")
    assert len(example.messages()) == 4
    with pytest.raises(ValueError, match="no step 1 to go on from"):
        models.state_at(example, 0)


def test_the_store_forgets_the_oldest_run(model):
    runs = Runs()
    ask = Ask(model=model, task="joint", prompt="a", seed=0, settings={})
    ids = [runs.start(ask, 8).id for _ in range(KEPT_RUNS + 1)]
    assert ids[0] not in runs and all(run_id in runs for run_id in ids[1:])
    with pytest.raises(ValueError, match="no longer kept"):
        runs.get(ids[0])


def test_steps_come_back_as_they_were_kept():
    steps = Steps()
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3).T, np.zeros((0, 4), np.uint8)]
    for number, text in enumerate(["é <b> 🎈", ""]):
        steps.add({"text": text, "number": number}, {"index": number, "array": arrays[number], "none": None})
    assert [steps.message(number) for number in (1, 0)] == [
        {"text": "", "number": 1},
        {"text": "é <b> 🎈", "number": 0},
    ]
    for number, array in enumerate(arrays):
        state = steps.state(number)
        assert state["index"] == number and state["none"] is None
        np.testing.assert_array_equal(state["array"], array)
        assert state["array"].dtype == array.dtype and state["array"].shape == array.shape
    assert len(steps) == 2 and steps.bytes > 24


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
def test_a_full_disk_is_one_sentence():
    steps = Steps()
    steps.add({"text": "one"}, {})
    steps._file.close()
    with (
        open("/dev/full", "r+b", buffering=0) as steps._file,
        pytest.raises(ValueError, match="cannot keep this run's"),
    ):
        steps.add({"text": "two"}, {})
    assert len(steps) == 1
