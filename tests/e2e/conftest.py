"""A running app and a real browser. On every page a console error or a request to another host fails its test."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from launching import CHROMIUM, PATIENCE, QUIET, ROOT, TASKS, running_app
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from univigu import UniViGUPipeline
from univigu.video import write_video

sys.path.insert(0, str(ROOT / "tests" / "univigu"))

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def browser():
    if not Path(CHROMIUM).exists():
        reason = "Chromium is not installed (apt-get install chromium)"
        if os.environ.get("UNIVIGU_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def model(browser, tmp_path_factory) -> str:
    """The embedded model where it is installed, else one of random weights that makes clips of the same size."""
    embedded = ROOT / "assets" / "toybox"
    if (embedded / "model_index.json").is_file():
        return str(embedded)
    from serving import tiny_model

    size = {"default_num_frames": 17, "default_height": 64, "default_width": 64}
    return tiny_model(tmp_path_factory.mktemp("model"), **size)


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_video(path, np.stack([np.full((64, 64, 3), 12 * index, np.uint8) for index in range(17)]), 8)
    return str(path)


@pytest.fixture(scope="session")
def examples(model, clip, tmp_path_factory) -> Path:
    """What the page shows before anything was run: a saved run for each tab, and a clip to understand."""
    folder = tmp_path_factory.mktemp("examples")
    pipe = UniViGUPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for task in TASKS:
        prompt, video = ("", clip) if task == "understand" else (f"a red ball for {task}", None)
        run = pipe(task, prompt, video, num_inference_steps=4, seed=1, keep_trajectory=True)
        run.trajectory.save(folder / f"{task}.json")
    shutil.copy(clip, folder / "getting-brighter.mp4")
    return folder


@pytest.fixture(scope="session")
def app(model, examples, tmp_path_factory):
    """The address of the running app."""
    with running_app(model, examples, tmp_path_factory.mktemp("gradio")) as (address, _):
        yield address


@pytest.fixture(scope="session")
def problems() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def no_problems(problems):
    """Every watched page stays free of errors and asks nobody but the app."""
    yield
    found = problems[:]
    problems.clear()
    assert found == []


@pytest.fixture(scope="session")
def watch(problems):
    """Watch a page from its first request on."""

    def elsewhere(url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme not in ("data", "blob", "file") and parts.hostname != "127.0.0.1"

    def start(page: Page) -> Page:
        page.on(
            "console",
            lambda message: (
                problems.append(f"{message.text} ({message.location['url']})") if message.type == "error" else None
            ),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if elsewhere(request.url) else None)
        page.set_default_timeout(PATIENCE)
        return page

    return start


@pytest.fixture(scope="session")
def context(browser: Browser):
    """One profile for most tests: Gradio's files are fetched once. Nothing moves by itself in it, which is what
    `prefers-reduced-motion` asks for and what saves a busy machine the most work."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, accept_downloads=True, reduced_motion="reduce"
    )
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, watch):
    page = watch(context.new_page())
    yield page
    page.close()
