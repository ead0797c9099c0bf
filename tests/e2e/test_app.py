"""The app in a real browser, from click to result.

Tests that only look at a finished run share one (`shown`). What must happen while a run goes on is done by the page
itself (`while_running`), since on a busy machine a test may be slower than the run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client
from launching import TASKS
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from univigu.video import write_gif, write_video


def open_app(page: Page, app: str, task: str = "joint", **query) -> Locator:
    """Open the app on a tab and return its viewer."""
    settings = "&".join(f"{key}={value}" for key, value in {"task": task, **query}.items())
    page.goto(f"{app}?{settings}")
    viewer = page.locator(f"#{task}-view .uvg")
    expect(viewer).to_be_visible()
    # what the link asks for has arrived when its seed has
    if "seed" in query:
        expect(panel(page, task).get_by_label("Seed", exact=True)).to_have_value(str(query["seed"]))
    expect(viewer).to_have_attribute("data-run", f"example-{task}")
    return viewer


def panel(page: Page, task: str) -> Locator:
    return page.get_by_role("tabpanel").filter(has=page.locator(f"#{task}-run"))


def click_run(page: Page, task: str, prompt: str | None = None) -> None:
    if prompt is not None:
        panel(page, task).get_by_label("Prompt", exact=True).first.fill(prompt)
    page.locator(f"#{task}-run").click()


def run(page: Page, task: str, prompt: str | None = None) -> None:
    """Run, and wait for the first step."""
    before = page.locator(f"#{task}-view .uvg").get_attribute("data-run")
    click_run(page, task, prompt)
    started(page, task, before)


def started(page: Page, task: str, before: str) -> None:
    expect(page.locator(f"#{task}-view .uvg")).not_to_have_attribute("data-run", before)


def finished(viewer: Locator, state: str = "done") -> int:
    """Wait for the end of the run; how many steps the page then holds."""
    expect(viewer).to_have_attribute("data-state", state)
    return int(viewer.get_attribute("data-have"))


def picture(viewer: Locator) -> str:
    """The clip's frame on the screen, once that of the present step has been drawn: images are decoded on the side."""
    kind = viewer.locator(".uvg-kinds [aria-pressed=true]").get_attribute("data-kind")
    step = viewer.get_attribute("data-step")
    expect(viewer.locator(".uvg-plate").first).to_have_attribute("data-drawn", f"{step}:{kind}")
    return viewer.locator(".uvg-frame").first.evaluate("canvas => canvas.toDataURL()")


def words(viewer: Locator) -> str:
    return viewer.locator(".uvg-tokens").first.inner_text()


def while_running(viewer: Locator, script: str, drawn: bool = False) -> None:
    """In the next run, call `script` (a function of the number of steps held) once for each number; with `drawn`, also
    whenever another step is drawn, which is not as often as steps come in."""
    viewer.evaluate(
        """(viewer, [script, drawn]) => {
        const act = eval(script), before = viewer.dataset.run;
        let run, last;
        window.seen = [];
        new MutationObserver(() => {
            const { have, step } = viewer.dataset, now = drawn ? have + ":" + step : have;
            run ??= viewer.dataset.run === before ? undefined : viewer.dataset.run;
            if (!run || viewer.dataset.run !== run || now === last) return;
            last = now;
            act(Number(have), viewer);
        }).observe(viewer, { attributes: true, attributeFilter: ["data-have", "data-run", "data-step"] }) }""",
        [script, drawn],
    )


@pytest.fixture(scope="module")
def visit(context: BrowserContext, watch, app):
    """A page of the app on a tab, with a number of steps set: opened once, then used by several tests."""
    viewers = {}

    def visit(task: str, steps: int) -> Locator:
        if (task, steps) not in viewers:
            page = watch(context.new_page())
            viewers[task, steps] = open_app(page, app, task, seed=3, num_inference_steps=steps)
        viewers[task, steps].page.bring_to_front()
        return viewers[task, steps]

    yield visit
    for viewer in viewers.values():
        viewer.page.close()


@pytest.fixture(scope="module")
def finished_run(visit):
    viewer = visit("joint", 6)
    run(viewer.page, "joint", "a red ball moves left")
    assert finished(viewer) == 6
    return viewer


@pytest.fixture
def shown(finished_run) -> Locator:
    """A finished joint run of six steps, alone on the page, at its last step."""
    finished_run.page.bring_to_front()
    if finished_run.get_attribute("data-beside") is not None:
        finished_run.get_by_label("Show beside it").select_option("nothing")
    finished_run.get_by_role("button", name="Clean guess").click()
    finished_run.get_by_role("slider", name="Step").press("End")
    expect(finished_run).to_have_attribute("data-step", "5")
    return finished_run


# ------------------------------------------------------------------------------------------------- from click to result


def test_the_page_opens_with_a_run_to_look_at(page, app):
    viewer = open_app(page, app)
    expect(viewer.locator(".uvg-prompt").first).to_have_text("a red ball for joint")
    expect(viewer).to_have_attribute("data-have", "4")
    viewer.get_by_role("slider", name="Step").press("Home")
    first = picture(viewer), words(viewer)
    page.keyboard.press("End")
    assert picture(viewer) != first[0] and words(viewer) != first[1]
    for task in ("generate", "understand"):
        page.get_by_role("tab", name=task.capitalize()).click()
        expect(page.locator(f"#{task}-view .uvg")).to_have_attribute("data-have", "4")


@pytest.mark.parametrize("task", ["generate", "joint"])
def test_a_prompt_becomes_a_run_whose_steps_arrive_one_by_one(visit, task):
    viewer = visit(task, 6)
    while_running(viewer, "have => window.seen.push(have)")
    run(viewer.page, task, "a red ball moves left")
    assert finished(viewer) == 6
    assert viewer.page.evaluate("window.seen") == [1, 2, 3, 4, 5, 6]
    expect(viewer.locator(".uvg-prompt").first).to_have_text("a red ball moves left")
    expect(viewer.locator(".uvg-where")).to_contain_text("Step 6 of 6")


def test_a_clip_becomes_a_caption(visit, clip):
    viewer = visit("understand", 4)
    choose(viewer.page, clip)
    run(viewer.page, "understand")
    assert finished(viewer) == 4
    assert len(words(viewer).split()) > 1


@pytest.mark.parametrize(
    ("task", "steps", "example"), [("joint", 6, "a boat at sunset"), ("understand", 4, "getting brighter")]
)
def test_an_example_runs_in_one_click(visit, task, steps, example):
    viewer = visit(task, steps)
    before = viewer.get_attribute("data-run")
    panel(viewer.page, task).get_by_text(example).first.click()
    started(viewer.page, task, before)
    assert finished(viewer) == steps
    if task == "joint":
        expect(viewer.locator(".uvg-prompt").first).to_have_text(example)


# ------------------------------------------------------------------------------------------------------- moving through


def test_arrow_keys_move_frames_and_words_together(shown):
    slider, page = shown.get_by_role("slider", name="Step"), shown.page
    slider.focus()
    page.keyboard.press("Home")
    expect(shown).to_have_attribute("data-step", "0")
    first = picture(shown), words(shown)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(shown).to_have_attribute("data-step", "2")
    expect(slider).to_have_attribute(
        "aria-valuetext", re.compile(r"^step 3 of 6, clip time 0\.\d\d, caption time 0\.\d\d$")
    )
    page.keyboard.press("End")
    expect(shown).to_have_attribute("data-step", "5")
    assert picture(shown) != first[0]
    assert words(shown) != first[1]
    page.keyboard.press("Home")
    assert (picture(shown), words(shown)) == first


def test_scrubbing_asks_nobody(shown):
    requests = []
    shown.page.on("request", lambda request: requests.append(request.url) if request.url.startswith("http") else None)
    shown.get_by_role("slider", name="Step").focus()
    for key in ["Home", *["ArrowRight"] * 5, "ArrowLeft"]:
        shown.page.keyboard.press(key)
    shown.get_by_role("button", name="Noisy state").click()
    expect(shown).to_have_attribute("data-step", "4")
    assert [url for url in requests if "heartbeat" not in url] == []


def test_the_noisy_state_is_another_picture(shown):
    shown.get_by_role("slider", name="Step").press("Home")
    clean = picture(shown)
    button = shown.get_by_role("button", name="Noisy state")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    shown.page.wait_for_function(
        "old => document.querySelector('#joint-view .uvg-frame').toDataURL() !== old", arg=clean
    )


def test_the_trajectory_plays(shown):
    shown.get_by_role("slider", name="Step").press("Home")
    shown.get_by_role("button", name="Play steps").click()
    expect(shown).to_have_attribute("data-step", "5")
    expect(shown.get_by_role("button", name="Play steps")).to_be_visible()


def test_the_clip_plays_and_pauses(shown):
    frames = "() => document.querySelector('#joint-view .uvg-plate').dataset.frame"
    shown.get_by_role("button", name="Play clip").click()
    before = shown.page.evaluate(frames)
    shown.page.wait_for_function(f"before => ({frames})() !== before", arg=before)
    shown.get_by_role("button", name="Pause clip").click()
    # a frame of the film strip holds the clip there
    shown.locator(".uvg-strip").first.click(position={"x": 3, "y": 3})
    assert shown.page.evaluate(frames) == "0"


def test_live_follow_yields_to_the_first_move_and_comes_back(visit):
    viewer = visit("joint", 40)
    while_running(
        viewer,
        """(have, viewer) => {
        const live = viewer.querySelector(".uvg-live"), step = Number(viewer.dataset.step), noted = window.seen.length;
        const note = (what) => window.seen.push(
            [what, viewer.dataset.step >= (window.heldThen ?? 2), live.getAttribute("aria-pressed")]);
        const home = new KeyboardEvent("keydown", { key: "Home", bubbles: true });
        if (noted === 0 && step >= 2) {
            note("followed");
            viewer.querySelector(".uvg-range").dispatchEvent(home);
            note("moved");
            window.heldThen = have;
        } else if (noted === 2 && have >= window.heldThen + 6) {
            note("stayed");
            live.click();
            note("asked to follow");
            window.stepThen = Number(viewer.dataset.step);
        } else if (noted === 4 && step > window.stepThen) note("followed again");
        }""",
        drawn=True,
    )
    run(viewer.page, "joint", "a red ball moves left")
    finished(viewer)
    assert viewer.page.evaluate("window.seen") == [
        ["followed", True, "true"],
        ["moved", False, "false"],
        ["stayed", False, "false"],
        ["asked to follow", True, "true"],
        ["followed again", True, "true"],
    ]


def test_stop_keeps_what_is_there(visit):
    viewer = visit("joint", 40)
    while_running(viewer, "have => { if (have === 2) document.querySelector('#joint-stop').click() }")
    run(viewer.page, "joint", "a red ball moves left")
    have = finished(viewer, "stopped")
    assert 2 <= have < 40
    viewer.get_by_role("slider", name="Step").press("Home")
    expect(viewer).to_have_attribute("data-step", "0")
    # and the next run is not held up
    run(viewer.page, "joint", "a blue boat")
    expect(viewer.locator(".uvg-prompt").first).to_have_text("a blue boat")
    viewer.page.locator("#joint-stop").click()
    expect(viewer).to_have_attribute("data-state", re.compile("stopped|done"))


def test_a_tab_left_and_opened_again_is_complete(visit):
    viewer = visit("joint", 40)
    before = viewer.get_attribute("data-run")
    click_run(viewer.page, "joint", "a red ball moves left")
    viewer.page.get_by_role("tab", name="Generate").click()
    expect(viewer.page.locator("#generate-view .uvg")).to_be_visible()
    viewer.page.get_by_role("tab", name="Joint").click()
    started(viewer.page, "joint", before)
    assert finished(viewer) == 40


def test_a_reload_in_mid_run_starts_afresh(visit, problems):
    viewer = visit("joint", 40)
    while_running(viewer, "have => { if (have === 2) location.reload() }")
    with viewer.page.expect_event("load"):
        click_run(viewer.page, "joint", "a red ball moves left")
    expect(viewer).to_have_attribute("data-run", "example-joint")
    problems.clear()  # Gradio logs the streams that the reload cut off
    run(viewer.page, "joint", "a blue boat")
    assert finished(viewer) == 40


# ------------------------------------------------------------------------------------------ branch, compare, look, take


def test_branching_with_other_words_shows_both_side_by_side(shown):
    shown.get_by_role("slider", name="Step").press("Home")
    shown.page.keyboard.press("ArrowRight")
    shown.get_by_role("textbox", name="Caption").fill("a small green star <img src=x onerror=alert(1)>")
    shown.get_by_label("hold this caption to the end").check()
    before = shown.get_attribute("data-run")
    shown.get_by_role("button", name="Run on from step 2").click()
    started(shown.page, "joint", before)
    expect(shown).to_have_attribute("data-beside", "")
    assert finished(shown) == 6
    plates = shown.locator(".uvg-plate")
    expect(plates).to_have_count(2)
    expect(plates.nth(1).locator(".uvg-facts")).to_have_text("branch from step 2")
    assert plates.nth(1).locator(".uvg-tokens").inner_text().startswith("a small green star")
    expect(shown.locator(".uvg-tokens img")).to_have_count(0)
    # before the branch both are the same run
    shown.get_by_role("slider", name="Step").press("Home")
    pictures = plates.locator(".uvg-frame").evaluate_all("all => all.map(canvas => canvas.toDataURL())")
    assert pictures[0] == pictures[1]


def test_another_seed_beside_it(shown):
    before = shown.get_attribute("data-run")
    shown.get_by_role("button", name="Same prompt, another seed").click()
    started(shown.page, "joint", before)
    expect(shown).to_have_attribute("data-beside", "")
    assert finished(shown) == 6
    seeds = shown.locator(".uvg-facts").all_inner_texts()
    assert seeds[0] == "seed 3" and seeds[1] != seeds[0]
    shown.get_by_label("Show beside it").select_option("nothing")
    expect(shown.locator(".uvg-plate").nth(1)).to_be_hidden()


def test_a_word_shows_where_it_looks(shown):
    shown.get_by_role("slider", name="Step").press("ArrowLeft")
    shown.locator('.uvg-word[data-token="1"]').first.click()
    expect(shown).to_have_attribute("data-looking", "4:1")
    expect(shown.locator(".uvg-looking").first).to_contain_text("looks")
    shades = shown.locator(".uvg-heat").first.evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)"
    )
    assert min(shades) < max(shades)
    # at another step the same word is looked at again
    shown.get_by_role("slider", name="Step").press("ArrowLeft")
    expect(shown).to_have_attribute("data-looking", "3:1")
    shown.locator('.uvg-word[data-token="1"]').first.click()
    expect(shown.locator(".uvg-heat").first).to_be_hidden()


def test_files_are_taken_away(shown, page, tmp_path):
    starts = {
        "mp4": b"ftyp",
        "gif": b"GIF8",
        "JSON": b"univigu-trajectory",
        "page with this slider": b"<!doctype html>",
        "caption": b"",
    }
    for name, start in starts.items():
        with shown.page.expect_download() as download:
            shown.get_by_role("button", name=name, exact=True).click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert start in path.read_bytes()[:100], name
    saved_run = json.loads((tmp_path / "univigu-joint-3.json").read_text())
    assert saved_run["prompt"] == "a red ball moves left"
    assert (tmp_path / "univigu-joint-3.txt").read_text() == saved_run["text"]
    # the saved page plays from disk, with no server
    page.goto(f"file://{tmp_path}/univigu-joint-3.html")
    saved = page.locator(".uvg")
    saved.get_by_role("slider", name="Step").press("Home")
    expect(saved).to_have_attribute("data-step", "0")
    page.keyboard.press("ArrowRight")
    expect(saved).to_have_attribute("data-step", "1")
    expect(saved.locator(".uvg-prompt").first).to_have_text("a red ball moves left")


def test_a_link_reopens_the_run(page, app):
    prompt = "a red ball & a <b>star</b>"
    viewer = open_app(page, app, seed=77, num_inference_steps=3, guidance_scale=2.5, order="text_first")
    run(page, "joint", prompt)
    finished(viewer)
    shown = picture(viewer), words(viewer)
    page.goto(viewer.locator(".uvg-link").evaluate("link => link.href"))
    expect(panel(page, "joint").get_by_label("Prompt", exact=True).first).to_have_value(prompt)
    expect(panel(page, "joint").get_by_label("Seed", exact=True)).to_have_value("77")
    expect(viewer).to_have_attribute("data-run", "example-joint")
    run(page, "joint")
    assert finished(viewer) == 6  # one leg for the caption, one for the clip
    expect(viewer.locator(".uvg-left")).to_be_empty()
    assert (picture(viewer), words(viewer)) == shown


# -------------------------------------------------------------------------------------------------------- every visitor


def test_two_pages_at_once_do_not_mix(browser: Browser, watch, app):
    prompts = ["a red ball moves left", "a blue boat over the sea"]
    contexts = [browser.new_context(reduced_motion="reduce") for _ in prompts]
    pages = [watch(context.new_page()) for context in contexts]
    viewers = [open_app(page, app, seed=3, num_inference_steps=20) for page in pages]
    for page, prompt in zip(pages, prompts, strict=True):
        click_run(page, "joint", prompt)
    for page in pages:
        started(page, "joint", "example-joint")
    assert [finished(viewer) for viewer in viewers] == [20, 20]
    for viewer, prompt in zip(viewers, prompts, strict=True):
        expect(viewer.locator(".uvg-prompt").first).to_have_text(prompt)
    assert viewers[0].get_attribute("data-run") != viewers[1].get_attribute("data-run")
    for context in contexts:
        context.close()


def test_who_waits_sees_the_place_in_the_queue(visit, app):
    client = Client(app, verbose=False)
    ahead = [client.submit("a red ball", steps=100, api_name="/joint") for _ in range(4)]
    viewer = visit("joint", 6)
    before = viewer.get_attribute("data-run")
    click_run(viewer.page, "joint", "a blue boat")
    expect(panel(viewer.page, "joint").get_by_text(re.compile(r"queue: \d+/\d+"))).to_be_visible()
    for job in ahead:
        job.cancel()
    started(viewer.page, "joint", before)
    assert finished(viewer) == 6
    client.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_tab_fits_every_screen(page, app, theme):
    page.goto(f"{app}?__theme={theme}")
    for task in TASKS:
        page.get_by_role("tab", name=task.capitalize()).click()
        viewer = page.locator(f"#{task}-view .uvg")
        expect(viewer).to_be_visible()
        for width in (390, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            box = viewer.locator(".uvg-range").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
    ink = viewer.evaluate("viewer => getComputedStyle(viewer).color")
    light = sum(map(int, re.findall(r"\d+", ink)[:3])) > 384
    assert light == (theme == "dark")


def test_a_phone_runs_it_by_touch(browser: Browser, watch, app):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    context = browser.new_context(**phone, reduced_motion="reduce")
    page = watch(context.new_page())
    viewer = open_app(page, app, seed=3, num_inference_steps=6)
    panel(page, "joint").get_by_label("Prompt", exact=True).first.fill("a red ball")
    page.locator("#joint-run").tap()
    started(page, "joint", "example-joint")
    finished(viewer)
    # the run is brought into view, and a tap at the slider's start goes there
    expect(viewer.locator(".uvg-screen").first).to_be_in_viewport()
    viewer.locator(".uvg-range").tap(position={"x": 4, "y": 14})
    expect(viewer).to_have_attribute("data-step", "0")
    context.close()


def test_nothing_moves_while_steps_arrive(shown):
    shown.evaluate(
        """viewer => {
        const parts = [...viewer.querySelectorAll(
            ".uvg-screen, .uvg-tokens, .uvg-film, .uvg-bar, .uvg-charts, .uvg-tools")];
        const places = () => JSON.stringify(parts.map(part => { const box = part.getBoundingClientRect();
            return [box.x, box.y + scrollY, box.width].map(Math.round) }));
        const first = places();
        window.moved = [];
        new MutationObserver(() => { if (places() !== first) window.moved.push([first, places()]) })
            .observe(viewer, { attributes: true, attributeFilter: ["data-step"] }) }"""
    )
    run(shown.page, "joint", "a blue boat over the sea")
    assert finished(shown) == 6
    assert shown.page.evaluate("window.moved") == []


def test_everything_has_a_name_and_says_its_state(shown):
    nameless = shown.evaluate(
        """viewer => [...viewer.querySelectorAll("button, input, select, textarea, a, canvas[role=img], svg[role=img]")]
        .filter(part => part.checkVisibility() && !(part.ariaLabel || part.textContent.trim() || part.labels?.length))
        .map(part => part.outerHTML)"""
    )
    assert nameless == []
    expect(shown.locator("[role=status]")).to_have_text("Finished.")
    expect(shown.get_by_role("slider", name="Step")).to_have_attribute("aria-valuetext", re.compile("step 6 of 6"))
    # words are one stop for the Tab key, and arrows move among them
    word = shown.locator('.uvg-word[data-token="0"]').first
    word.focus()
    shown.page.keyboard.press("ArrowRight")
    expect(shown.locator('.uvg-word[data-token="1"]').first).to_be_focused()
    expect(shown).to_have_attribute("data-step", "5")


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(page: Page, sentence: str) -> None:
    toast = page.locator(".toast-body.error")
    expect(toast).to_have_count(1)
    expect(toast).to_contain_text(sentence)
    toast.get_by_role("button").first.click()
    expect(toast).to_have_count(0)


def test_bad_prompts_are_one_sentence_and_the_page_goes_on(visit):
    viewer = visit("joint", 6)
    click_run(viewer.page, "joint", "")
    refused(viewer.page, "Please write a prompt first")
    click_run(viewer.page, "joint", "red " * 2501)
    refused(viewer.page, "please keep it under 10,000")
    for prompt in ("🎈 flies", "كرة حمراء", "<script>alert(1)</script><img src=x onerror=alert(2)>"):
        run(viewer.page, "joint", prompt)
        expect(viewer.locator(".uvg-prompt").first).to_have_text(prompt)
        assert finished(viewer) == 6


def choose(page: Page, path: str | Path) -> None:
    """Put a file in the place of the one before."""
    field = page.locator("#understand-clip")
    if not field.locator("input[type=file]").count():
        field.get_by_role("button", name=re.compile("clear|remove", re.I)).first.click()
    field.locator("input[type=file]").set_input_files(path)
    expect(field).to_contain_text(Path(path).stem)


def test_bad_clips_are_one_sentence_and_the_page_goes_on(visit, problems, tmp_path):
    viewer = visit("understand", 4)
    page = viewer.page
    frames = np.zeros((9, 64, 64, 3), np.uint8)
    (tmp_path / "text.mp4").write_text("this is no video")
    choose(page, tmp_path / "text.mp4")
    click_run(page, "understand")
    refused(page, "text.mp4")
    page.locator("#understand-clip").get_by_role("button", name=re.compile("clear|remove", re.I)).first.click()
    click_run(page, "understand")
    refused(page, "Please choose a clip first")
    with (tmp_path / "huge.mp4").open("wb") as file:
        file.truncate(21 * 2**20)
    page.locator("#understand-clip input[type=file]").set_input_files(tmp_path / "huge.mp4")
    refused(page, "20")
    write_gif(tmp_path / "moving.gif", frames, 8)
    choose(page, tmp_path / "moving.gif")
    run(page, "understand")
    assert finished(viewer) == 4
    write_video(tmp_path / "still.mp4", frames[:1], 8)
    choose(page, tmp_path / "still.mp4")
    run(page, "understand")
    expect(page.locator(".toast-body.info")).to_contain_text("a single frame")
    assert finished(viewer) == 4
    # Gradio asks how a refused upload gets on, and is told that there is none
    problems[:] = [text for text in problems if "upload_progress" not in text and not text.startswith("Response ")]
