"""The command line: what it writes, what it prints where, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_weights import RELEASED, save_wan
from tiny import tiny_pipeline

from univigu.cli import main
from univigu.video import probe, write_video
from univigu.weights import load

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, a clip and several things that are no clip."""
    folder = tmp_path_factory.mktemp("cli")
    pipe = tiny_pipeline()
    pipe.fit_previewer()
    pipe.save_pretrained(folder / "model")
    frames = np.random.default_rng(0).integers(0, 255, (16, 48, 64, 3), dtype=np.uint8)
    write_video(folder / "clip.mp4", frames, 8)
    data = (folder / "clip.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no clip")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Run a command line beside the model: (exit code, stdout, stderr)."""
    monkeypatch.chdir(place)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return command


# ------------------------------------------------------------------------------------------------------ what comes out


def test_generate_writes_a_clip(run, place):
    code, out, err = run("generate", "a red ball", "--model", "model", "--seed", "3", "--output", "a.mp4", "--json")
    result = json.loads(out)
    assert code == 0 and result["steps_done"] == 4 and not result["stopped"]
    assert (result["task"], result["seed"], result["output"], result["text"]) == ("generate", 3, "a.mp4", None)
    info = probe("a.mp4")
    assert (info.num_frames, info.fps, info.height, info.width) == (9, 8.0, 256, 256)  # 32 pixels, enlarged by 8
    assert "4/4" in err and "Wrote a.mp4 (seed 3)" in err


def test_joint_prints_the_caption_and_keeps_every_step(run):
    arguments = ["joint", "a red ball", "--model", "model", "--seed", "3", "--steps", "3", "--order", "text_first"]
    code, out, _ = run(*arguments, "--output", "b.gif", "--save-trajectory", "b.json")
    saved = json.loads(Path("b.json").read_text())
    assert code == 0 and out.strip() == saved["text"]
    assert len(saved["steps"]) == 6 and saved["steps"][-1]["text"] == saved["text"]
    assert saved["settings"] == {
        "num_inference_steps": 3,
        "num_frames": 9,
        "height": 32,
        "width": 32,
        "negative_prompt": "",
        "order": "text_first",
    }
    assert Image.open("b.gif").n_frames > 1

    again = load("model").joint("a red ball", num_inference_steps=3, order="text_first", seed=3)
    assert again.text == saved["text"]


def test_the_page_of_a_run_needs_nothing_else(run):
    code, _out, _ = run("joint", "<script>alert(1)</script>", "--model", "model", "--save-trajectory", "run.html")
    page = Path("run.html").read_text()
    assert code == 0 and "<script>alert" not in page and "data:image/jpeg;base64" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_understand_reads_the_span_that_was_asked_for(run):
    arguments = ["understand", "clip.mp4", "--model", "model", "--seed", "1", "--json"]
    whole = json.loads(run(*arguments)[1])
    assert whole["fps"] == pytest.approx(9 / 2) and whole["text"]
    assert json.loads(run(*arguments)[1])["text"] == whole["text"]
    span = json.loads(run(*arguments, "--start", "0.5", "--fps", "8", "--fit", "pad", "--caption-guidance", "2")[1])
    assert span["fps"] == 8.0 and span["settings"]["caption_guidance"] == 2.0
    every = json.loads(run(*arguments, "--recompute-video-every", "1")[1])
    assert every["text"] == whole["text"]  # this model's video is blind to the caption: nothing to recompute


@pytest.mark.parametrize("scheduler", ["unipc", "dpm++"])
def test_other_schedulers_walk_elsewhere(run, scheduler):
    shared = [
        "generate",
        "a red ball",
        "--model",
        "model",
        "--seed",
        "3",
        "--negative-prompt",
        "sea",
        "--guidance",
        "3",
    ]
    assert run(*shared, "--save-trajectory", "euler.json")[0] == 0
    assert run(*shared, "--scheduler", scheduler, "--save-trajectory", "other.json")[0] == 0
    euler, other = (json.loads(Path(name).read_text())["steps"] for name in ("euler.json", "other.json"))
    assert [step["tau_video"] for step in euler] == [step["tau_video"] for step in other]
    assert euler[0]["noisy"] == other[0]["noisy"]  # higher orders start with one plain step
    assert euler[-1]["clean"] != other[-1]["clean"]


def test_without_a_seed_a_new_one_is_drawn_and_told(run):
    shared = ["joint", "a ball", "--model", "model", "--save-trajectory", "c.json", "--json"]
    first, second = (json.loads(run(*shared)[1]) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = json.loads(run(*shared, "--seed", str(first["seed"]))[1])
    assert again["text"] == first["text"]


def test_what_is_cut_from_a_prompt_is_said(run, caplog):
    prompt = "a red ball moves left and a blue box moves right over the sea and the star"
    code, out, _ = run("generate", prompt, "--model", "model", "--output", "d.mp4", "--json")
    assert code == 0 and json.loads(out)["cut_from_prompt"] == "the star"
    assert "The prompt is longer than 16 tokens; left out: 'the star'" in caplog.text


def test_import_saves_a_model_that_runs(run, place, tmp_path):
    wan = save_wan(tmp_path / "wan")
    code, out, _ = run("import", "--released", str(RELEASED), "--wan", str(wan), "--output", "ours", "--json")
    result = json.loads(out)
    assert code == 0 and result["kind"] == "univigu" and result["dtype"] == "bfloat16"
    pipe = load("ours")
    assert pipe.previewer is not None and pipe.config.empty_prompt == "zeros"
    assert result["parameters"] == sum(weight.numel() for weight in pipe.transformer.parameters())
    size = ["--frames", "5", "--height", "16", "--width", "16", "--steps", "2"]
    assert run("joint", "a ball", "--model", "ours", *size, "--dtype", "bfloat16", "--output", "e.mp4")[0] == 0

    assert run("import", "--wan", str(wan), "--output", "start", "--no-previewer", "--dtype", "float32")[0] == 0
    assert load("start").previewer is None
    code, out, err = run("import", "--wan", str(wan), "--output", "start")
    assert code == 2 and "not empty" in err


def test_a_lora_changes_the_run(run, place):
    from peft import LoraConfig

    transformer = load("model").transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=16, target_modules=["to_q", "to_v"], init_lora_weights=False))
    transformer.save_lora_adapter(place / "lora")
    shared = ["generate", "a red ball", "--model", "model", "--seed", "3"]
    run(*shared, "--save-trajectory", "plain.json")
    assert run(*shared, "--lora", "lora", "--save-trajectory", "lora.json")[0] == 0
    assert json.loads(Path("plain.json").read_text())["steps"] != json.loads(Path("lora.json").read_text())["steps"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("understand missing.mp4", "There is no file"),
        ("understand empty.mp4", "empty file"),
        ("understand cut.mp4", "cut short"),
        ("understand sound.mp4", "no moving pictures"),
        ("understand text.mp4", "cannot be read as a video"),
        ("understand .", "is a folder"),
        ("understand clip.mp4 --fps 4", "give a longer clip"),
        ("understand clip.mp4 --start 9", "choose a start within the clip"),
        ("understand clip.mp4 --frames 10", "multiple of 4 plus 1"),
        ("generate x --output o.mp4 --frames 8", "multiple of 4 plus 1"),
        ("generate x --output o.mp4 --height 33", "multiple of 8"),
        ("generate x --output o.mp4 --steps 0", "whole number from 1 up, not '0'"),
        ("generate x --output o.mp4 --steps 2.5", "whole number from 1 up"),
        ("generate x --output o.mp4 --guidance nan", "must be a finite number, not 'nan'"),
        ("generate x --output o.mp4 --guidance much", "must be a finite number, not 'much'"),
        ("generate x --output o.mp4 --seed -1", "seed must be a whole number from 0 up"),
        ("generate x --output o.mp4 --scheduler ddim", "invalid choice: 'ddim'"),
        ("generate x --output o.mp4 --device abacus", "There is no device 'abacus'"),
        ("generate x --output o.mp4 --lora missing", "There is no LoRA 'missing'"),
        ("generate x --output o.mp4 --lora text.mp4", "holds no LoRA"),
        ("generate x --output o.avi", "must end in .mp4 or .gif"),
        ("generate x --output no/such/o.mp4", "there is no folder"),
        ("generate x --save-trajectory o.txt", "must end in .html or .json"),
        ("generate x", "say where it goes"),
        ("generate", "arguments are required: prompt"),
        ("joint x --output o.mp4 --order backwards", "invalid choice: 'backwards'"),
        ("paint x", "invalid choice: 'paint'"),
        ("", "arguments are required"),
        ("bench --rounds 0", "--rounds must be a whole number"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, message):
    arguments = arguments.split()
    if arguments and arguments[0] in ("generate", "understand", "joint"):
        arguments += ["--model", "model"]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err and err.startswith("univigu: ") and err.count("\n") == 1


def test_a_model_that_is_none_is_one_sentence(run, tmp_path, place):
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    wan = str(save_wan(tmp_path / "wan", text_dim=16))
    for arguments, message in (
        (["generate", "x", "--output", "o.mp4", "--model", "toybax"], "There is no model 'toybax'"),
        (["generate", "x", "--output", "o.mp4", "--model", "text.mp4"], "'text.mp4' cannot be read"),
        (["generate", "x", "--output", "o.mp4", "--model", str(tmp_path / "other.pth"), "--wan", wan], "holds weight"),
        (["import", "--released", str(RELEASED), "--wan", wan, "--output", "never"], r"(64, 24), but"),
        (["import", "--wan", "model", "--output", "never"], "not a WanPipeline"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert message in err and err.count("\n") == 1
    assert not (place / "never").exists()


# ---------------------------------------------------------------------------------------------------- as a real process


def test_bad_input_ends_a_process_with_2(place):
    command = [sys.executable, "-m", "univigu", "understand", str(place / "text.mp4"), "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("univigu: 'text.mp4' cannot be read") and done.stderr.count("\n") == 1


def test_ctrl_c_keeps_the_steps_until_then(place):
    command = [sys.executable, "-m", "univigu", "joint", "a ball", "--model", str(place / "model"), "--json"]
    command += ["--steps", "20000", "--output", str(place / "s.mp4"), "--save-trajectory", str(place / "s.json")]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a background job's children ignore Ctrl-C unless told otherwise
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = b""
    while b"step/s" not in seen:  # the bar appears with the first step
        read = process.stderr.read1(4096)
        assert read, seen
        seen += read
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    result = json.loads(out)
    assert process.returncode == 130 and result["stopped"]
    assert b"Stopped after step" in err and b"kept what was there" in err and b"Traceback" not in err
    saved = json.loads((place / "s.json").read_text())
    assert 1 <= len(saved["steps"]) == result["steps_done"] < 20000
    assert probe(place / "s.mp4").num_frames == 9
