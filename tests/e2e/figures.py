"""The figures of the app, measured in a real browser: `python tests/e2e/figures.py --model FOLDER`.

Prints one line each: page ready, click to first preview, a run in the page against the same run from Python, bytes a
step, key press to changed frame against an empty handler, and memory over many runs. `--film FILE.gif` draws a moving
picture instead: the slider going through the run that the page opens with.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from launching import CHROMIUM, PATIENCE, QUIET, ROOT, running_app
from PIL import Image
from playwright.sync_api import CDPSession, Page, sync_playwright

sys.path.insert(0, str(ROOT))  # where the package lies that `python app.py` finds beside itself
from univigu import UniViGUPipeline

PROMPT, SEED = "a red ball bounces over a meadow", 3

# Resolves with the milliseconds from a click on Run to the first step drawn and to the end of the run.
RUN = """() => new Promise((resolve) => {
  const viewer = document.querySelector("#joint-view .uvg"), before = viewer.dataset.run;
  const start = performance.now();
  let first;
  const watch = new MutationObserver(() => {
    if (!viewer.dataset.run || viewer.dataset.run === before) return;
    first ??= performance.now() - start;
    if (viewer.dataset.state !== "done") return;
    watch.disconnect();
    resolve([first, performance.now() - start]);
  });
  watch.observe(viewer, { attributes: true });
  document.querySelector("#joint-run").click();
})"""

# From the next key press on a target to the paint that follows it.
PAINT = """(selector) => {
  const target = document.querySelector(selector);
  window.painted = new Promise((resolve) => {
    target.addEventListener("keydown", (event) => {
      const channel = new MessageChannel();
      channel.port1.onmessage = () => resolve(performance.now() - event.timeStamp);
      requestAnimationFrame(() => channel.port2.postMessage(0));
    }, { once: true, capture: true });
  });
  target.focus();
}"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default=str(ROOT / "assets" / "toybox"), help="a pipeline folder")
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--runs", type=int, default=50, help="runs for the memory figure")
    options.add_argument("--film", type=Path, help="draw this gif of the slider and measure nothing")
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp())
    started = time.perf_counter()
    with (
        running_app(given.model, ROOT / "assets" / "examples", folder) as (address, process),
        sync_playwright() as play,
    ):
        show("server up", f"{time.perf_counter() - started:.1f} s after `python app.py`")
        browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=PATIENCE)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        if given.film:
            page.goto(f"{address}?task=joint")
            draw_film(page, given.film)
            return
        started = time.perf_counter()
        page.goto(f"{address}?task=joint&prompt={PROMPT}&seed={SEED}&num_inference_steps={given.steps}")
        page.locator("#joint-view .uvg").wait_for()
        page.wait_for_function(f"[...document.querySelectorAll('textarea')].some(field => field.value === '{PROMPT}')")
        page.locator("#joint-view .uvg[data-have]").wait_for()  # the saved run has been fetched and drawn
        show("page ready", f"{time.perf_counter() - started:.2f} s after it was asked for")
        devtools = page.context.new_cdp_session(page)
        page.evaluate(RUN)  # the first run of a process is slower than those that follow
        measure_runs(page, devtools, given.model, given.steps)
        measure_keys(page)
        measure_memory(page, devtools, process.pid, given.runs)
        browser.close()


def measure_runs(page: Page, devtools: CDPSession, model: str, steps: int) -> None:
    pipe = UniViGUPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.joint(PROMPT, num_inference_steps=2, seed=SEED)

    cores = torch.get_num_threads()

    def in_python(threads: int = cores, **kept: bool) -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        run = pipe.joint(PROMPT, num_inference_steps=steps, seed=SEED, **kept)
        if kept:
            run.trajectory.messages()
        return 1000 * (time.perf_counter() - started)

    of_the_app = max(1, cores - 1)  # as app.py has it
    ways = [
        ("the same from Python", {"threads": of_the_app, "keep_trajectory": True}),
        ("on all cores", {"keep_trajectory": True}),
        ("its end alone", {"threads": of_the_app}),
        ("on all cores", {}),
    ]
    times = []
    for _ in range(5):  # taking turns, so that other load on the machine meets all alike
        times.append((*page.evaluate(RUN), *(in_python(**way) for _, way in ways)))
    first, whole, *others = (statistics.median(column) / 1000 for column in zip(*times, strict=True))
    show("click to first preview", f"{first:.2f} s (median of 5)")
    show(f"{steps}-step joint run", f"{whole:.2f} s in the page")
    for (what, way), other in zip(ways, others, strict=True):
        threads = way.get("threads", cores)
        more = ", every step's pictures and words" if "keep_trajectory" in way else ""
        show(what, f"{other:.2f} s: {whole / other:.2f} x ({threads} thread{'s' * (threads > 1)}{more})")
    show("bytes a step", f"{received_in_a_run(page, devtools) / steps:,.0f}")


def received_in_a_run(page: Page, devtools: CDPSession) -> int:
    """What the stream of a run's steps sends. A run apart: a browser that counts takes longer."""
    streams, received = set(), []
    devtools.send("Network.enable")
    devtools.on(
        "Network.requestWillBeSent",
        lambda event: streams.add(event["requestId"]) if "queue/data" in event["request"]["url"] else None,
    )
    devtools.on(
        "Network.dataReceived",
        lambda event: received.append(event["dataLength"]) if event["requestId"] in streams else None,
    )
    page.evaluate(RUN)
    devtools.send("Network.disable")
    return sum(received)


def measure_keys(page: Page) -> None:
    page.locator(".uvg-range").last.press("Home")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<button id=idle>idle</button>')")
    changed, idle, steps = [], [], set()
    for _ in range(25):
        for selector, times in (("#joint-view .uvg-range", changed), ("#idle", idle)):
            page.evaluate(PAINT, selector)
            page.keyboard.press("ArrowRight")
            times.append(page.evaluate("window.painted"))
        steps.add(page.locator("#joint-view .uvg").get_attribute("data-step"))
    assert len(steps) == 25, f"the key moved the slider to {len(steps)} steps, not 25"
    moved, nothing = statistics.median(changed), statistics.median(idle)
    show("key press to new frame", f"{moved:.1f} ms, empty handler {nothing:.1f} ms: {moved - nothing:+.1f} ms")


def measure_memory(page: Page, devtools: CDPSession, pid: int, runs: int) -> None:
    for done in range(runs + 1):
        if done % 10 == 0:
            devtools.send("HeapProfiler.collectGarbage")
            heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
            status = Path(f"/proc/{pid}/status").read_text()
            resident = int(status.partition("VmRSS:")[2].split()[0]) / 1024
            show(f"memory after {done} runs", f"server {resident:,.0f} MiB, page {heap:.0f} MiB")
        if done < runs:
            page.evaluate(RUN)


def draw_film(page: Page, target: Path) -> None:
    """The viewer at every step, as somebody sees it who holds the arrow key down."""
    viewer = page.locator("#joint-view .uvg")
    slider = viewer.get_by_role("slider", name="Step")
    page.wait_for_function("document.querySelector('#joint-view .uvg')?.dataset.have > 0")
    slider.press("Home")
    pictures = []
    for _ in range(int(viewer.get_attribute("data-have")) + 1):
        picture = Image.open(io.BytesIO(viewer.screenshot())).convert("RGB")
        pictures.append(picture.quantize(128, dither=Image.Dither.NONE))
        slider.press("ArrowRight")
    waits = [700, *[150] * (len(pictures) - 2), 2500]
    pictures[0].save(target, save_all=True, append_images=pictures[1:], duration=waits, loop=0, optimize=True)


def show(what: str, figure: str) -> None:
    print(f"{what:<24} {figure}", flush=True)


if __name__ == "__main__":
    main()
