"""The engine over one process and two: equal within rounding, exact where it resumes, and what it says otherwise."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from engine import TinyObjective, run, run_in_processes
from safetensors.torch import load_file

from training.config import OptimConfig, RunConfig
from training.stages import is_token_branch
from training.trainer import find_checkpoints
from training.zero import zero_config
from univigu import UniViGUTransformer3DModel

# Adam makes a step of 1e-2 of any gradient, rounding alone included: on some CPUs a weight is 3e-5 off after four.
ROUNDING = 2e-4


def settings(folder, optim=(), **changes) -> dict:
    top = {key: changes.pop(key) for key in ("trained", "nan_from", "gone_from", "size") if key in changes}
    return {"run": {"folder": str(folder), **changes}, "optim": dict(optim), **top}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights/diffusion_pytorch_model.safetensors")


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def difference(first, second) -> float:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Four steps of two micro-batches in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(settings(folder, {"accumulate": 2})) == 0
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The same in two processes, a micro-batch each, with the weights cut in two."""
    folder = tmp_path_factory.mktemp("together")
    for code, output in run_in_processes(settings(folder, fsdp=True)):
        assert code == 0, output
    return folder


def test_two_processes_with_shards_are_one_process_within_rounding(alone, together, tmp_path):
    assert difference(alone, together) < ROUNDING
    run(settings(tmp_path))  # the micro-batch of one process alone
    assert difference(alone, tmp_path) > 20 * ROUNDING
    start = dict(TinyObjective().flow.transformer.state_dict())
    assert max(float((start[name] - tensor).abs().max()) for name, tensor in weights(alone).items()) > 1e-2
    ours, theirs = log(alone)[-1], log(together)[-1]
    assert ours["validation/output"] == pytest.approx(theirs["validation/output"], rel=1e-4)
    samples = [json.loads((folder / "samples/4.json").read_text())["output"] for folder in (alone, together)]
    assert samples[0] == pytest.approx(samples[1], rel=1e-4)
    last = find_checkpoints(together)[-1]
    assert len(list(last.glob("*.safetensors"))) == 2  # a file each


CASES = {
    "shards": {"large": 1 << 27},
    "shards and large layers by themselves": {"large": 100},
    "a task each": {"large": 100, "size": 1},
    "a task each, whole weights": {"size": 1},
    "adapters in shards": {"large": 1 << 27, "trained": "lora"},
    "one context": {"context": 2},
    "one context in shards": {"context": 2, "large": 100, "checkpointing": True},
    "one context of one clip": {"context": 2, "large": 100, "size": 1},
}


@pytest.fixture(scope="module")
def compared() -> dict[str, list[dict]]:
    """What each process says of each case."""
    said: dict[str, list[dict]] = {}
    for code, output in run_in_processes({"compare": list(CASES.values())}):
        assert code == 0, output
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for name, line in zip(CASES, lines, strict=True):
            said.setdefault(name, []).append(line)
    return said


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_of_two_processes_are_those_of_one(compared, case):
    for process in compared[case]:
        assert process["loss"] < 1e-5 and process["gap"] < 1e-5 < 1e-2 < process["largest"]
        modules = list(TinyObjective().modules())
        large = sum(isinstance(part, torch.nn.Linear) and part.weight.numel() > 100 for part in modules)
        assert large > 10 and process["parts"] == {None: 0, 1 << 27: 3, 100: 3 + large}[CASES[case].get("large")]


def test_two_processes_share_the_positions_of_every_clip(alone, tmp_path):
    config = settings(tmp_path, {"accumulate": 2}, fsdp=True, context_parallel=2, checkpointing=True)
    for code, output in run_in_processes(config):
        assert code == 0, output
    assert difference(alone, tmp_path) < ROUNDING
    assert log(alone)[-1]["validation/output"] == pytest.approx(log(tmp_path)[-1]["validation/output"], rel=1e-4)


def test_positions_are_shared_by_processes_that_are_there(tmp_path):
    with pytest.raises(ValueError, match=r"run\.context_parallel=2 needs as many processes or more"):
        run(settings(tmp_path, context_parallel=2))


def test_adapters_in_two_processes_leave_the_rest_as_it_was_bit_for_bit(tmp_path):
    """One clip a micro-batch, so that in some steps each process has a task of its own."""
    for code, output in run_in_processes(settings(tmp_path / "two", trained="lora", size=1, fsdp=True)):
        assert code == 0, output
    run(settings(tmp_path / "one", {"accumulate": 2}, trained="lora", size=1))
    assert difference(tmp_path / "one", tmp_path / "two") < ROUNDING
    start, end = TinyObjective().flow.transformer.state_dict(), weights(tmp_path / "two")
    for name, tensor in start.items():
        adapted = name.endswith(("to_q.weight", "to_v.weight"))
        assert (adapted or is_token_branch(name)) != bool((end[name] == tensor).all()), name
    adapters = load_file(tmp_path / "two/lora/pytorch_lora_weights.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapters.values())
    for folder in (tmp_path / "one", tmp_path / "two"):
        stored = {k for f in find_checkpoints(folder)[-1].glob("*.safetensors") for k in load_file(f)}
        trained = {k.removeprefix("model.flow.transformer.") for k in stored if k.startswith("model.")}
        assert trained and all(".lora_" in name or is_token_branch(name) for name in trained)


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
def test_deepspeed_in_two_processes_is_one_process_within_rounding(alone, tmp_path):
    """Its first half as well: a checkpoint of its own, then one of a process without it."""
    for code, output in run_in_processes(settings(tmp_path / "run", deepspeed=2)):
        assert code == 0, output
    assert difference(alone, tmp_path / "run") < ROUNDING
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    shutil.copytree(alone / "checkpoints/step-00000002", tmp_path / "other/checkpoints/step-00000002")
    assert run(settings(tmp_path / "run", {"accumulate": 2})) == 0
    for code, output in run_in_processes(settings(tmp_path / "other", deepspeed=2)):
        assert code == 0, output
    assert difference(alone, tmp_path / "run") < ROUNDING and difference(alone, tmp_path / "other") < ROUNDING


def test_deepspeed_is_told_what_the_run_asks_for():
    config = zero_config(RunConfig(deepspeed=2, mixed_precision="bf16"), OptimConfig(grad_clip=0.5))
    assert config["zero_optimization"] == {"stage": 2} and config["gradient_clipping"] == 0.5
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"run\.deepspeed takes optim\.name=adamw"):
        zero_config(RunConfig(deepspeed=2, fsdp=True), OptimConfig())


@pytest.mark.skipif(HAS_DEEPSPEED, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"run\.deepspeed=2 needs the package deepspeed: pip install deepspeed\."):
        run(settings(tmp_path, deepspeed=2))


def test_what_two_saved_one_goes_on_with(alone, together, tmp_path):
    shutil.copytree(together, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    assert run(settings(tmp_path / "run")) == 0  # accumulate=1 is what two processes were given
    assert difference(tmp_path / "run", alone) < ROUNDING
    assert any(line.get("event") == "resume" and line["step"] == 2 for line in log(tmp_path / "run"))


def test_what_one_saved_two_go_on_with(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    shutil.rmtree(tmp_path / "run/weights")
    for code, output in run_in_processes(settings(tmp_path / "run", {"accumulate": 2}, fsdp=True)):
        assert code == 0, output
    assert difference(tmp_path / "run", alone) < ROUNDING


def test_a_resumed_run_is_the_run_that_was_never_stopped_bit_for_bit(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    run(settings(tmp_path / "run", {"accumulate": 2}))
    assert difference(tmp_path / "run", alone) == 0
    one, other = (find_checkpoints(folder)[-1] for folder in (alone, tmp_path / "run"))
    for file in one.glob("*.safetensors"):
        first, second = load_file(file), load_file(other / file.name)
        assert all((first[name] == second[name]).all() for name in first) and first.keys() == second.keys()
        assert {name.split(".")[0] for name in first} == {"model", "optimizer", "average"}


def test_a_number_of_processes_that_cannot_share_the_step_is_refused(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    for name in ("checkpoints/step-00000002", "checkpoints/step-00000004"):
        path = tmp_path / "run" / name / "progress.json"
        text = path.read_text().replace('"micro_batches": 2', '"micro_batches": 3')
        path.write_text(text)
        files = tmp_path / "run" / name / "files.json"
        sizes = json.loads(files.read_text())
        files.write_text(json.dumps({**sizes, "progress.json": len(text)}))
    for _, output in run_in_processes(settings(tmp_path / "run", fsdp=True)):
        assert "takes 3 micro-batches a step, which 2 processes cannot share evenly" in output


# --------------------------------------------------------------------------------------------------- parts of the model


def test_a_frozen_video_expert_does_not_change_by_a_bit(tmp_path):
    start = {k: v.clone() for k, v in TinyObjective().flow.transformer.state_dict().items()}
    run(settings(tmp_path, trained="token_branch"))
    end = weights(tmp_path)
    for name, tensor in start.items():
        assert is_token_branch(name) != bool((end[name] == tensor).all()), name
    stored = {k for f in find_checkpoints(tmp_path)[-1].glob("*.safetensors") for k in load_file(f)}
    assert all(is_token_branch(name.split(".", 3)[3]) for name in stored if name.startswith("model."))


def test_checkpointing_changes_nothing_but_memory(alone, tmp_path):
    run(settings(tmp_path, {"accumulate": 2}, checkpointing=True))
    assert difference(alone, tmp_path) < 1e-6


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_nan_is_one_message_and_the_last_good_checkpoint_stays(tmp_path):
    with pytest.raises(ValueError, match=r"Step 4 gave a loss of nan .*step-00000002 is the last good checkpoint"):
        run(settings(tmp_path, nan_from=3))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000002"]
    assert run(settings(tmp_path)) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_goes_missing_is_one_message_and_loses_no_step(alone, tmp_path, workers):
    with pytest.raises(ValueError) as error:
        run(settings(tmp_path, {"accumulate": 2}, gone_from=7, workers=workers))
    assert str(error.value) == (
        "'latents/3.safetensors' of the cache is gone. Step 3 is saved, and a resumed run starts there."
    )
    assert find_checkpoints(tmp_path)[-1].name == "step-00000003"
    run(settings(tmp_path, {"accumulate": 2}))
    assert difference(alone, tmp_path) == 0


def test_a_checkpoint_of_other_weights_is_refused(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    config = settings(tmp_path / "run", trained="token_branch")
    with pytest.raises(ValueError, match="'model' settings differ"):
        run(config)


def test_settings_that_need_what_is_not_here_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="adamw8bit needs the package bitsandbytes"):
        run(settings(tmp_path, {"name": "adamw8bit"}))


def test_the_export_is_a_network_of_ours(together):
    UniViGUTransformer3DModel.from_pretrained(together / "weights")
