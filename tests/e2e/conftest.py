"""A running app and a real browser. On every page a console error or a request to another host fails its test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "univigu"))

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
OPTIONS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
QUIET = [f"--{option}" for option in (*OPTIONS, "disable-component-update", "disable-sync")]


@pytest.fixture(scope="session")
def browser():
    if not Path(CHROMIUM).exists():
        reason = "Chromium is not installed (apt-get install chromium)"
        if os.environ.get("UNIVIGU_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """The embedded model where it is installed, else one of random weights."""
    if (ROOT / "assets" / "toybox" / "model_index.json").is_file():
        return "toybox"
    from serving import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def app(model, tmp_path_factory):
    """The address of `python app.py`."""
    offline = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1,localhost"}
    offline["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    process = subprocess.Popen(
        [sys.executable, "-u", "app.py", "--model", model, "--device", "cpu", "--host", "127.0.0.1"],
        cwd=ROOT,
        env={**os.environ, **offline},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout:
        if "Running on local URL" in line:
            yield line.split()[-1]
            break
    else:
        pytest.fail(f"python app.py ended with {process.wait()} before it served a page")
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture
def watch():
    """Watch a page from its first request on."""
    problems = []

    def start(page: Page) -> Page:
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if elsewhere(request.url) else None)
        return page

    yield start
    assert problems == []


def elsewhere(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob", "file") and parts.hostname != "127.0.0.1"


@pytest.fixture(scope="session")
def context(browser: Browser):
    """One profile for most tests: Gradio's files are fetched once."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, watch):
    page = watch(context.new_page())
    yield page
    page.close()
