"""How the browser and the app are started, for the tests and for the figures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
OPTIONS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
QUIET = [f"--{option}" for option in (*OPTIONS, "disable-component-update", "disable-sync")]
# How long anything may take on a machine that is busy with other things, in milliseconds.
PATIENCE = 300_000
TASKS = ("generate", "understand", "joint")


@contextmanager
def running_app(model: str, examples: Path, files: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """`python app.py`: its address and its process."""
    offline = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1,localhost"}
    given = ["--model", model, "--device", "cpu", "--host", "127.0.0.1", "--examples", str(examples)]
    process = subprocess.Popen(
        [sys.executable, "-u", "app.py", *given],
        cwd=ROOT,
        env={**os.environ, **offline, "GRADIO_TEMP_DIR": str(files)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        for line in process.stdout:
            if "Running on local URL" in line:
                yield line.split()[-1], process
                return
        raise RuntimeError(f"python app.py ended with {process.wait()} before it served a page")
    finally:
        process.terminate()
        process.wait(timeout=60)
