"""The trainer's promises: a resumed run is the run that was never stopped, and every failure is one sentence."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from training.__main__ import main
from training.config import OptimConfig, RunConfig, load_config
from training.muon import orthogonalise
from training.stages import StageRun
from training.trainer import find_checkpoints, train


class Points(Dataset):
    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(16, generator=generator)
        return {"x": x, "y": x.flip(0).cumsum(0)}


class Line(torch.nn.Module):
    """A small regression with noise of its own, so that a difference in any random state would show."""

    def __init__(self, poison_at: int | None = None, seconds: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
        self.train_data, self.poison_at, self.seconds, self.calls = Points(), poison_at, seconds, 0

    def forward(self, batch, generator):
        self.calls += 1
        time.sleep(self.seconds)
        noise = torch.randn(batch["x"].shape, generator=generator, device=batch["x"].device)
        loss = (self.net(batch["x"] + 0.1 * noise) - batch["y"]).square().mean()
        return loss * (float("nan") if self.calls == self.poison_at else 1.0), {"noise": noise.mean()}

    def validate(self) -> dict[str, float]:
        return {"norm": float(sum(p.square().sum() for p in self.parameters()))}

    def draw_samples(self, folder: Path, step: int) -> None:
        (folder / f"{step}.txt").write_text("sample")

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.state_dict(), folder / "weights.pt")


def settings(folder: Path, steps: int, **changes) -> RunConfig:
    values = {"batch_size": 4, "workers": 0, "log_every": 1, "save_every": 2, "validate_every": 100}
    return RunConfig(folder=str(folder), steps=steps, **{**values, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights/weights.pt", weights_only=True)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


CONSTANT = {"schedule": "constant", "warmup_steps": 1, "lr": 1e-2}


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_stopping_halfway_changes_nothing(tmp_path, optimiser):
    optim = OptimConfig(name=optimiser, accumulate=2, **CONSTANT)
    assert train(Line(), settings(tmp_path / "whole", 8), optim) == 0
    assert train(Line(), settings(tmp_path / "halves", 4), optim) == 0
    assert train(Line(), settings(tmp_path / "halves", 8), optim) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)  # the averaged weights, bit for bit
    assert losses(tmp_path / "whole")[8] < losses(tmp_path / "whole")[1]


class Prompted(Line):
    """With a prompt encoder: a table of words and a matrix."""

    def __init__(self):
        super().__init__()
        self.prompt_encoder = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 16))

    def forward(self, batch, generator):
        words = batch["x"][:, :4].mul(8).long().abs() % 32
        loss, figures = super().forward({**batch, "x": batch["x"] + self.prompt_encoder(words).mean(1)}, generator)
        return loss, figures


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_prompt_encoder_learns_at_a_rate_of_its_own(tmp_path, optimiser):
    def moved(name: str, rate: float | None) -> dict[str, float]:
        optim = OptimConfig(name=optimiser, prompt_encoder_lr=rate, **CONSTANT)
        assert train(Prompted(), settings(tmp_path / name, 4, ema_decay=0.0), optim) == 0
        before, after = Prompted().state_dict(), weights(tmp_path / name)
        return {key: float((after[key] - before[key]).abs().max()) for key in before}

    still, slow, alike = moved("still", 0.0), moved("slow", 1e-4), moved("alike", None)
    encoder = [name for name in still if name.startswith("prompt_encoder")]
    assert encoder and all(still[name] == 0 for name in encoder)
    assert all(0 < slow[name] <= 4 * 1e-4 * 1.5 < alike[name] for name in encoder)  # a step of Adam's: about the rate
    assert all(rates["net.0.weight"] > 1e-3 for rates in (still, slow, alike))


def test_a_rate_for_a_prompt_encoder_that_is_not_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no prompt encoder is trained"):
        train(Line(), settings(tmp_path, 4), OptimConfig(prompt_encoder_lr=1e-4))


def test_a_killed_run_loses_the_steps_since_its_last_checkpoint_and_no_more(tmp_path):
    here = Path(__file__)
    code = (
        f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[2])!r}]\n"
        "from pathlib import Path\n"
        "from test_trainer import CONSTANT, Line, settings\n"
        "from training.config import OptimConfig\n"
        "from training.trainer import train\n"
        f"train(Line(seconds=0.05), settings(Path({str(tmp_path / 'killed')!r}), 1000), OptimConfig(**CONSTANT))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while not (tmp_path / "killed/checkpoints/step-00000006").exists() and time.monotonic() < end:
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    reached = int(find_checkpoints(tmp_path / "killed")[-1].name.removeprefix("step-"))
    assert reached >= 6
    steps = reached + 3
    assert train(Line(), settings(tmp_path / "killed", steps), OptimConfig(**CONSTANT)) == 0
    assert train(Line(), settings(tmp_path / "whole", steps), OptimConfig(**CONSTANT)) == 0
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_truncated_checkpoint_is_passed_over(tmp_path, capsys):
    train(Line(), settings(tmp_path, 4), OptimConfig(**CONSTANT))
    files = (tmp_path / "checkpoints/step-00000004").rglob("*.safetensors")
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    train(Line(), settings(tmp_path, 6), OptimConfig(**CONSTANT))
    output = capsys.readouterr()
    assert f"{largest.name} has" in output.err
    assert "from step 2" in output.out
    assert [path.name for path in find_checkpoints(tmp_path)][-1] == "step-00000006"


def test_a_full_disk_is_one_sentence_and_keeps_what_is_there(tmp_path):
    train(Line(), settings(tmp_path, 2), OptimConfig(**CONSTANT))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # no file may grow beyond this: as if the disk were full
    try:
        with pytest.raises(ValueError, match=r"step 4 could not be written .* step-00000002 is kept"):
            train(Line(), settings(tmp_path, 4), OptimConfig(**CONSTANT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000002"]
    assert train(Line(), settings(tmp_path, 4), OptimConfig(**CONSTANT)) == 0


def test_a_loss_that_is_no_number_stops_the_run_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"Step 4 gave a loss of nan .*lower optim.lr .*step-00000002"):
        train(Line(poison_at=4), settings(tmp_path, 8), OptimConfig(**CONSTANT))


def test_a_bare_no_is_a_word():
    assert load_config(StageRun, "recall", ["run.mixed_precision=no"]).run.mixed_precision == "no"


def test_matrices_in_a_stack_move_as_they_would_alone():
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        stack = torch.randn(3, *shape)
        together = orthogonalise(stack)
        for matrix, update in zip(stack, together, strict=True):
            torch.testing.assert_close(orthogonalise(matrix), update, atol=1e-4, rtol=0)
        values = torch.linalg.svdvals(together)
        assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lrr=1", "There is no setting optim.lrr; the nearest is optim.lr"),
        (
            "objective.prompt_drop=1",
            "There is no setting objective.prompt_drop; the nearest is objective.prompt_dropout",
        ),
        ("run.steps=many", "run.steps must be int, not 'many'"),
        ("stage.name=refined", "stage.name must be one of pretrain, recall, refine"),
        ("stage.name=recall", "This is a configuration of recall: start it with that command"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override, sentence, capsys):
    assert main(["refine", override]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "pretrain",
        "recall",
        "recall_scratch",
        "refine",
        "refine-single",
        "refine-gpu",
        "pretrain_continued",
        "captioner",
        "vae",
    ],
)
def test_every_configuration_is_readable(name):
    from training.baselines import CaptionerRun
    from training.config import load_config
    from training.stages import StageRun
    from training.vae import VAERun

    kind = {"captioner": CaptionerRun, "vae": VAERun}.get(name, StageRun)
    config = load_config(kind, name, [])
    assert config.run.folder == f"runs/{name.replace('-', '_')}" and config.run.steps > 0
