"""The app in a real browser, from click to result."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from univigu.video import write_video

SECONDS = 1000
TASKS = ("generate", "understand", "joint")


def open_app(page: Page, app: str, task: str = "joint", **query) -> Locator:
    """Open the app on a tab and return its viewer."""
    settings = "&".join(f"{key}={value}" for key, value in {"task": task, **query}.items())
    page.goto(f"{app}?{settings}")
    viewer = page.locator(f"#{task}-view .uvg")
    expect(viewer).to_be_visible(timeout=30 * SECONDS)
    # what the link asks for has arrived when its seed has
    if "seed" in query:
        seed = page.get_by_role("tabpanel").filter(has=viewer).get_by_label("Seed", exact=True)
        expect(seed).to_have_value(str(query["seed"]))
    return viewer


def run(page: Page, task: str, prompt: str | None = None) -> None:
    if prompt is not None:
        panel = page.get_by_role("tabpanel").filter(has=page.locator(f"#{task}-run"))
        panel.get_by_label("Prompt", exact=True).first.fill(prompt)
    page.locator(f"#{task}-run").click()


def finished(viewer: Locator, state: str = "done") -> int:
    """Wait for the end of the run; how many steps the page then holds."""
    expect(viewer).to_have_attribute("data-state", state, timeout=60 * SECONDS)
    return int(viewer.get_attribute("data-have"))


def picture(viewer: Locator) -> str:
    return viewer.locator(".uvg-frame").first.evaluate("canvas => canvas.toDataURL()")


def words(viewer: Locator) -> str:
    return viewer.locator(".uvg-tokens").first.inner_text()


def hold_clip(viewer: Locator) -> None:
    viewer.get_by_role("button", name="Pause clip").click()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_video(path, np.stack([np.full((64, 64, 3), 12 * index, np.uint8) for index in range(17)]), 8)
    return str(path)


# ------------------------------------------------------------------------------------------------- from click to result


@pytest.mark.parametrize("task", ["generate", "joint"])
def test_a_prompt_becomes_a_run_whose_steps_arrive_one_by_one(page, app, task):
    viewer = open_app(page, app, task, seed=3, num_inference_steps=6)
    viewer.evaluate(
        """viewer => { window.seen = [];
        new MutationObserver(() => { const have = Number(viewer.dataset.have);
            const example = !viewer.dataset.run || viewer.dataset.run.startsWith("example");
            if (!example && have !== window.seen.at(-1)) window.seen.push(have);
        }).observe(viewer, { attributes: true, attributeFilter: ["data-have", "data-run"] }) }"""
    )
    run(page, task, "a red ball moves left")
    assert finished(viewer) == 6
    assert page.evaluate("window.seen") == [1, 2, 3, 4, 5, 6]
    expect(viewer.locator(".uvg-prompt").first).to_have_text("a red ball moves left")
    expect(viewer.locator(".uvg-where")).to_contain_text("Step 6 of 6")


def test_a_clip_becomes_a_caption(page, app, clip):
    viewer = open_app(page, app, "understand", seed=3, num_inference_steps=5)
    page.locator("#understand-clip input[type=file]").set_input_files(clip)
    expect(page.locator("#understand-clip")).to_contain_text("clip")
    run(page, "understand")
    assert finished(viewer) == 5
    assert len(words(viewer).split()) > 1


def test_an_example_runs_in_one_click(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=3)
    page.get_by_role("button", name="a boat at sunset").or_(page.get_by_text("a boat at sunset")).first.click()
    assert finished(viewer) == 3
    expect(viewer.locator(".uvg-prompt").first).to_have_text("a boat at sunset")


# ------------------------------------------------------------------------------------------------------- moving through


def test_arrow_keys_move_frames_and_words_together(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=6)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    hold_clip(viewer)
    slider = viewer.get_by_role("slider", name="Step")
    slider.focus()
    page.keyboard.press("Home")
    expect(viewer).to_have_attribute("data-step", "0")
    first = picture(viewer), words(viewer)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(viewer).to_have_attribute("data-step", "2")
    expect(slider).to_have_attribute(
        "aria-valuetext", re.compile(r"^step 3 of 6, clip time 0\.\d\d, caption time 0\.\d\d$")
    )
    page.keyboard.press("End")
    expect(viewer).to_have_attribute("data-step", "5")
    assert picture(viewer) != first[0]
    assert words(viewer) != first[1]
    page.keyboard.press("Home")
    assert (picture(viewer), words(viewer)) == first


def test_scrubbing_asks_nobody(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=6)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    requests = []
    page.on("request", lambda request: requests.append(request.url) if request.url.startswith("http") else None)
    viewer.get_by_role("slider", name="Step").focus()
    for key in ["Home", *["ArrowRight"] * 5, "ArrowLeft"]:
        page.keyboard.press(key)
    viewer.get_by_role("button", name="Noisy state").click()
    expect(viewer).to_have_attribute("data-step", "4")
    assert [url for url in requests if "heartbeat" not in url] == []


def test_the_noisy_state_is_another_picture(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=6)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    hold_clip(viewer)
    viewer.get_by_role("slider", name="Step").press("Home")
    clean = picture(viewer)
    button = viewer.get_by_role("button", name="Noisy state")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    page.wait_for_function("old => document.querySelector('#joint-view .uvg-frame').toDataURL() !== old", arg=clean)


def test_live_follow_yields_to_the_first_move_and_comes_back(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=100)
    run(page, "joint", "a red ball moves left")
    expect(viewer).to_have_attribute("data-have", re.compile(r"^[3-9]|\d\d"), timeout=30 * SECONDS)
    live = viewer.get_by_role("button", name="Live")
    expect(live).to_have_attribute("aria-pressed", "true")
    viewer.get_by_role("slider", name="Step").press("Home")
    expect(live).to_have_attribute("aria-pressed", "false")
    have = int(viewer.get_attribute("data-have"))
    page.wait_for_function(
        "have => Number(document.querySelector('#joint-view .uvg').dataset.have) > have + 2", arg=have
    )
    expect(viewer).to_have_attribute("data-step", "0")
    live.click()
    assert int(viewer.get_attribute("data-step")) > 2
    page.locator("#joint-stop").click()
    finished(viewer, "stopped")


def test_stop_keeps_what_is_there(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=100)
    run(page, "joint", "a red ball moves left")
    expect(viewer).to_have_attribute("data-have", re.compile(r"^[2-9]|\d\d"), timeout=30 * SECONDS)
    page.locator("#joint-stop").click()
    have = finished(viewer, "stopped")
    assert 2 <= have < 100
    viewer.get_by_role("slider", name="Step").press("Home")
    expect(viewer).to_have_attribute("data-step", "0")
    run(page, "joint", "a blue boat")
    expect(viewer.locator(".uvg-prompt").first).to_have_text("a blue boat", timeout=30 * SECONDS)
    page.locator("#joint-stop").click()
    finished(viewer, "stopped")


def test_the_trajectory_plays(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=5)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    viewer.get_by_role("slider", name="Step").press("Home")
    viewer.get_by_role("button", name="Play steps").click()
    expect(viewer).to_have_attribute("data-step", "4")
    expect(viewer.get_by_role("button", name="Play steps")).to_be_visible()


def test_a_tab_left_and_opened_again_is_complete(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=30)
    run(page, "joint", "a red ball moves left")
    page.get_by_role("tab", name="Generate").click()
    expect(page.locator("#generate-view .uvg")).to_be_visible()
    page.get_by_role("tab", name="Joint").click()
    assert finished(viewer) == 30


# ------------------------------------------------------------------------------------------ branch, compare, look, take


def test_branching_with_other_words_shows_both_side_by_side(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=6)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    viewer.get_by_role("slider", name="Step").press("Home")
    page.keyboard.press("ArrowRight")
    viewer.get_by_role("textbox", name="Caption").fill("a small green star")
    viewer.get_by_label("hold this caption to the end").check()
    viewer.get_by_role("button", name="Run on from step 2").click()
    expect(viewer).to_have_attribute("data-beside", "")
    assert finished(viewer) == 6
    plates = viewer.locator(".uvg-plate")
    expect(plates).to_have_count(2)
    expect(plates.nth(1).locator(".uvg-facts")).to_have_text("branch from step 2")
    assert plates.nth(1).locator(".uvg-tokens").inner_text().startswith("a small green star")
    # before the branch both are the same run
    hold_clip(plates.nth(0))
    viewer.get_by_role("slider", name="Step").press("Home")
    pictures = plates.locator(".uvg-frame").evaluate_all("all => all.map(canvas => canvas.toDataURL())")
    assert pictures[0] == pictures[1]


def test_another_seed_beside_it(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=3)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    viewer.get_by_role("button", name="Same prompt, another seed").click()
    expect(viewer).to_have_attribute("data-beside", "", timeout=30 * SECONDS)
    assert finished(viewer) == 3
    seeds = viewer.locator(".uvg-facts").all_inner_texts()
    assert seeds[0] == "seed 3" and seeds[1] != seeds[0]
    viewer.get_by_label("Show beside it").select_option("nothing")
    expect(viewer.locator(".uvg-plate").nth(1)).to_be_hidden()


def test_a_word_shows_where_it_looks(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=4)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    viewer.get_by_role("slider", name="Step").press("ArrowLeft")
    viewer.locator('.uvg-word[data-token="1"]').first.click()
    expect(viewer).to_have_attribute("data-looking", "2:1")
    expect(viewer.locator(".uvg-looking").first).to_contain_text("looks")
    shades = viewer.locator(".uvg-heat").first.evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)"
    )
    assert min(shades) < max(shades)
    # at another step the same word is looked at again
    viewer.get_by_role("slider", name="Step").press("ArrowLeft")
    expect(viewer).to_have_attribute("data-looking", "1:1")


def test_files_are_taken_away(page, app, tmp_path):
    viewer = open_app(page, app, seed=3, num_inference_steps=3)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    starts = {
        "mp4": b"ftyp",
        "gif": b"GIF8",
        "JSON": b"univigu-trajectory",
        "page with this slider": b"<!doctype html>",
    }
    for name, start in starts.items():
        with page.expect_download() as download:
            viewer.get_by_role("button", name=name, exact=True).click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert start in path.read_bytes()[:100], name
    assert json.loads((tmp_path / "univigu-joint-3.json").read_text())["prompt"] == "a red ball moves left"
    # the saved page plays from disk, with no server
    page.goto(f"file://{tmp_path}/univigu-joint-3.html")
    saved = page.locator(".uvg")
    saved.get_by_role("slider", name="Step").press("Home")
    expect(saved).to_have_attribute("data-step", "0")
    page.keyboard.press("ArrowRight")
    expect(saved).to_have_attribute("data-step", "1")
    expect(saved.locator(".uvg-prompt").first).to_have_text("a red ball moves left")


def test_a_link_reopens_the_run(page, app):
    viewer = open_app(page, app, seed=77, num_inference_steps=3)
    run(page, "joint", "a red ball & a <b>star</b>")
    finished(viewer)
    hold_clip(viewer)
    shown = picture(viewer), words(viewer)
    page.goto(viewer.locator(".uvg-link").evaluate("link => link.href"))
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#joint-run"))
    expect(panel.get_by_label("Prompt", exact=True).first).to_have_value("a red ball & a <b>star</b>")
    expect(panel.get_by_label("Seed", exact=True)).to_have_value("77")
    run(page, "joint")
    finished(viewer)
    hold_clip(viewer)
    viewer.locator(".uvg-strip").first.click(position={"x": 3, "y": 3})
    assert words(viewer) == shown[1]


# -------------------------------------------------------------------------------------------------------- every visitor


def test_two_pages_at_once_do_not_mix(browser: Browser, watch, app):
    prompts = ["a red ball moves left", "a blue boat over the sea"]
    contexts = [browser.new_context() for _ in prompts]
    pages = [watch(context.new_page()) for context in contexts]
    viewers = [open_app(page, app, seed=3, num_inference_steps=20) for page in pages]
    for page, prompt in zip(pages, prompts, strict=True):
        run(page, "joint", prompt)
    assert [finished(viewer) for viewer in viewers] == [20, 20]
    for viewer, prompt in zip(viewers, prompts, strict=True):
        expect(viewer.locator(".uvg-prompt").first).to_have_text(prompt)
    assert viewers[0].get_attribute("data-run") != viewers[1].get_attribute("data-run")
    for context in contexts:
        context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_every_tab_fits_every_screen(browser: Browser, watch, app, theme, width):
    context = browser.new_context(viewport={"width": width, "height": 844}, has_touch=width == 390)
    page = watch(context.new_page())
    page.goto(f"{app}?__theme={theme}")
    for task in TASKS:
        page.get_by_role("tab", name=task.capitalize()).click()
        viewer = page.locator(f"#{task}-view .uvg")
        expect(viewer).to_be_visible(timeout=30 * SECONDS)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = viewer.locator(".uvg-range").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    ink = viewer.evaluate("viewer => getComputedStyle(viewer).color")
    light = sum(map(int, re.findall(r"\d+", ink)[:3])) > 384
    assert light == (theme == "dark")
    context.close()


def test_nothing_moves_while_steps_arrive(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=5)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    viewer.evaluate(
        """viewer => {
        const parts = [...viewer.querySelectorAll(
            ".uvg-screen, .uvg-tokens, .uvg-film, .uvg-bar, .uvg-charts, .uvg-tools")];
        const places = () => JSON.stringify(parts.map(part => { const box = part.getBoundingClientRect();
            return [box.x, box.y + scrollY, box.width].map(Math.round) }));
        const first = places();
        window.moved = 0;
        new MutationObserver(() => { if (places() !== first) window.moved++ })
            .observe(viewer, { attributes: true, attributeFilter: ["data-step"] }) }"""
    )
    run(page, "joint", "a blue boat over the sea")
    expect(viewer.locator(".uvg-prompt").first).to_have_text("a blue boat over the sea")
    finished(viewer)
    assert page.evaluate("window.moved") == 0


def test_reduced_motion_starts_nothing_by_itself(browser: Browser, watch, app):
    context = browser.new_context(reduced_motion="reduce")
    page = watch(context.new_page())
    viewer = open_app(page, app, seed=3, num_inference_steps=3)
    run(page, "joint", "a red ball moves left")
    finished(viewer)
    expect(viewer.get_by_role("button", name="Play clip")).to_be_visible()
    context.close()


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(page: Page, sentence: str) -> None:
    toast = page.locator(".toast-body.error")
    expect(toast.last).to_contain_text(sentence)
    toast.last.get_by_role("button").first.click()


def test_bad_prompts_are_one_sentence_and_the_page_goes_on(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=2)
    run(page, "joint", "")
    refused(page, "Please write a prompt first")
    run(page, "joint", "red " * 2501)
    refused(page, "please keep it under 10,000")
    for prompt in ("🎈 flies", "كرة حمراء", "<script>alert(1)</script><img src=x onerror=alert(2)>"):
        run(page, "joint", prompt)
        expect(viewer.locator(".uvg-prompt").first).to_have_text(prompt, timeout=30 * SECONDS)
        assert finished(viewer) == 2


def test_markup_in_a_caption_stays_text(page, app):
    viewer = open_app(page, app, seed=3, num_inference_steps=4)
    run(page, "joint", "a red ball")
    finished(viewer)
    viewer.get_by_role("slider", name="Step").press("Home")
    viewer.get_by_role("textbox", name="Caption").fill("<img src=x onerror=alert(1)><b>a</b>")
    viewer.get_by_role("button", name="Run on from step 1").click()
    expect(viewer).to_have_attribute("data-beside", "", timeout=30 * SECONDS)
    finished(viewer)
    expect(viewer.locator(".uvg-tokens img, .uvg-tokens b")).to_have_count(0)


def test_bad_clips_are_one_sentence_and_the_page_goes_on(page, app, clip, tmp_path):
    viewer = open_app(page, app, "understand", seed=3, num_inference_steps=2)
    run(page, "understand")
    refused(page, "Please choose a clip first")
    (tmp_path / "text.mp4").write_text("this is no video")
    upload = page.locator("#understand-clip input[type=file]")
    upload.set_input_files(tmp_path / "text.mp4")
    expect(page.locator("#understand-clip")).to_contain_text("text")
    run(page, "understand")
    refused(page, "text.mp4")
    page.locator("#understand-clip").get_by_role("button", name=re.compile("clear|remove", re.I)).first.click()
    page.locator("#understand-clip input[type=file]").set_input_files(clip)
    expect(page.locator("#understand-clip")).to_contain_text("clip")
    run(page, "understand")
    assert finished(viewer) == 2
