"""Curves are what the logs hold."""

from __future__ import annotations

import json

import pytest

from training.__main__ import main
from training.curves import read_values


@pytest.fixture
def run(tmp_path):
    records = [{"step": 0, "event": "start"}, {"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}]
    records.append({"step": 20, "loss": 1.5})  # resumed from step 10
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_a_resumed_run_is_read_once(run):
    assert read_values(run / "log.jsonl", "loss") == ([10, 20], [2.0, 1.5])


def test_runs_are_drawn_beside_each_other(run, tmp_path):
    figure = tmp_path / "figure.svg"
    assert main(["curves", str(figure), "loss", f"one run={run}", str(run), "--until", "15"]) == 0
    drawing = figure.read_text()
    assert "one run" in drawing and run.name in drawing and "loss" in drawing


@pytest.mark.parametrize("value, sentence", [("accuracy", "holds no accuracy: it holds event, loss"), ("loss", "log")])
def test_what_cannot_be_drawn_is_one_sentence(run, tmp_path, capsys, value, sentence):
    if value == "loss":
        (run / "log.jsonl").unlink()
    assert main(["curves", str(tmp_path / "figure.svg"), value, str(run)]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "figure.svg").exists()
