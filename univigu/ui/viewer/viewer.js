// The trajectory viewer. It holds every step of every run in the page, so that moving through them asks nobody.
// `host` is what surrounds it: in the app the server's functions, in a saved page null. It knows nothing of Gradio.

function mountTrajectoryViewer(root, host) {
  "use strict";
  const KEPT_RUNS = 12;
  const STEPS_PER_SECOND = 8;
  const DRAWINGS_PER_SECOND = 12; // of a run that goes on; more would take from the model the core that both may share
  const SVG = "http://www.w3.org/2000/svg";
  const find = (selector, from = root) => from.querySelector(selector);
  const runs = new Map(); // id -> {id, meta, steps[], state, startedAt}
  const plates = [];
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  let shown = []; // ids of the runs on the plates: one, or two side by side
  let at = 0; // the step the slider is on
  let kind = "clean";
  let live = true;
  let playTimer = null;
  let drawTimer = null;
  let drawnAt = 0;
  let clipPlaying = !calm;
  let clipClock = performance.now();
  let heldFrame = 0;
  let looking = null; // {plate, token, word, heat} while a word is looked at more closely

  // ------------------------------------------------------------------------------------------------- what is held

  function stepOf(run, index) {
    while (run) {
      if (run.steps[index]) return run.steps[index];
      const parent = runs.get(run.meta.parent);
      if (!parent || index > run.meta.branch_at) return undefined;
      run = parent; // up to where it branched off, a branch shares its parent's steps
    }
  }

  function newestIndex(run) {
    return run.steps.length ? run.steps.length - 1 : (run.meta.branch_at ?? -1);
  }

  function newestStep(run) {
    return nearestStep(run, newestIndex(run));
  }

  function nearestStep(run, index) {
    for (let k = Math.min(index, newestIndex(run)); k >= 0; k--) {
      const step = stepOf(run, k);
      if (step) return step;
    }
  }

  function held(run) {
    let count = 0;
    for (let k = 0; k < run.meta.total; k++) if (stepOf(run, k)) count++;
    return count;
  }

  function picture(step, which) {
    const source = (which === "noisy" && step.noisy) || step.clean;
    if (!source) return null;
    const slot = source === step.clean ? "cleanImage" : "noisyImage";
    if (!step[slot]) {
      step[slot] = new Image();
      step[slot].src = source;
    }
    return step[slot];
  }

  function bytes(base64) {
    return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  }

  // Root mean square difference of two clips' thumbnails, 0..1.
  function distance(step, end) {
    if (!step.signature || !end.signature) return 0;
    step.thumbnail ??= bytes(step.signature);
    end.thumbnail ??= bytes(end.signature);
    let sum = 0;
    for (let i = 0; i < end.thumbnail.length; i++) sum += (step.thumbnail[i] - end.thumbnail[i]) ** 2;
    return Math.sqrt(sum / end.thumbnail.length) / 255;
  }

  function tokensToChange(step, end) {
    let count = 0;
    for (let i = 0; i < end.tokens.length; i++) if (step.tokens[i]?.[0] !== end.tokens[i][0]) count++;
    return count;
  }

  // --------------------------------------------------------------------------------------------- what is received

  function receive(message) {
    if (!message) return;
    if (message.messages) message.messages.forEach(take);
    else take(message);
    const run = runs.get(message.run ?? message.messages?.[0]?.run);
    if (!run) return;
    fillGaps(run);
    if (!newestStep(run)) return;
    follow(run);
    if (message.messages) introduce();
  }

  function take(message) {
    let run = runs.get(message.run);
    if (!run) {
      run = { id: message.run, meta: message, steps: [], state: "running", startedAt: performance.now() };
      runs.set(run.id, run);
      for (const id of runs.keys()) {
        if (runs.size <= KEPT_RUNS) break;
        if (id !== run.id && id !== message.parent && !shown.includes(id)) runs.delete(id);
      }
      show(message.beside && runs.has(message.beside) ? [message.beside, run.id] : [run.id]);
      live = true;
      stopPlaying();
      announce("Started.");
      if (!message.event && root.getBoundingClientRect().top > innerHeight * 0.6)
        root.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
    }
    if (message.event) {
      run.state = message.event;
      announce({ done: "Finished.", stopped: "Stopped; the steps so far are kept." }[message.event] ?? "");
    } else if (!run.steps[message.index]) {
      run.steps[message.index] = message;
      run.meta = message;
      picture(message, kind);
      if (message.index === message.total - 1 && run.state === "running") run.state = "done";
    }
  }

  // A page that opened this view late, or lost its connection, asks once for what it has not seen.
  function fillGaps(run) {
    if (!host?.steps || run.asking) return;
    const first = run.meta.parent ? run.meta.branch_at + 1 : 0;
    const missing = [];
    for (let k = first; k < newestIndex(run); k++) if (!run.steps[k]) missing.push(k);
    const empty = run.steps.length === 0 && run.meta.event;
    if (!missing.length && !empty) return;
    run.asking = true;
    host.steps({ run: run.id, have: Object.keys(run.steps).map(Number) }).then((messages) => {
      run.asking = false;
      messages.forEach(take);
      if (!newestStep(run)) return;
      follow(run);
      if (empty && run.state === "example") introduce();
    });
  }

  function follow(run) {
    if (live && shown.includes(run.id)) at = Math.max(0, newestIndex(run));
    putAttributes(root, { "data-have": held(runs.get(shown.at(-1))) });
    if (run.state !== "running" || root.dataset.run !== run.id) render();
    else drawTimer ??= setTimeout(render, Math.max(0, drawnAt + 1000 / DRAWINGS_PER_SECOND - performance.now()));
  }

  // A run that is finished when it is first seen plays itself once.
  function introduce() {
    if (!calm && !playTimer) togglePlaying();
  }

  // ------------------------------------------------------------------------------------------------- what is shown

  // Writing what is already there would still cost the browser a layout, and most of a page is the same at every step.
  function put(node, values) {
    for (const [key, value] of Object.entries(values)) if (node[key] !== value) node[key] = value;
  }

  function putAttributes(node, values) {
    for (const [key, value] of Object.entries(values))
      if (node.getAttribute(key) !== String(value)) node.setAttribute(key, value);
  }

  function putStyle(node, key, value) {
    if (node.style.getPropertyValue(key) !== String(value)) node.style.setProperty(key, value);
  }

  function show(ids) {
    shown = ids;
    looking = null;
    while (plates.length < ids.length) addPlate();
    for (const plate of plates) plate.looking.textContent = "";
    delete root.dataset.looking;
    plates.forEach((plate, i) => (plate.element.hidden = i >= ids.length));
    root.toggleAttribute("data-beside", ids.length > 1);
    heldFrame = 0;
    listRuns();
  }

  function addPlate() {
    const first = find(".uvg-plate");
    const element = plates.length ? first.cloneNode(true) : first;
    if (plates.length) {
      element.dataset.plate = plates.length;
      find(".uvg-letter", element).textContent = "B";
      find(".uvg-tokens", element).replaceChildren();
      find(".uvg-looking", element).textContent = "";
      first.after(element);
    }
    const number = plates.length;
    const plate = { element, number, words: [], frameShown: -1 };
    for (const part of ["frame", "heat", "strip", "marker", "tokens", "prompt", "facts", "hold", "film", "looking"])
      plate[part] = find(".uvg-" + part, element);
    plate.title = find(".uvg-caption-title", element);
    plate.reel = find(".uvg-reel", element);
    plate.hold.addEventListener("click", () => holdClip(clipPlaying));
    plate.strip.addEventListener("click", (event) => {
      const box = plate.strip.getBoundingClientRect();
      heldFrame = Math.floor(((event.clientX - box.left) / box.width) * (plate.step?.frame?.count ?? 1));
      holdClip(true);
    });
    plate.tokens.addEventListener("click", (event) => chooseWord(plate, event.target));
    plate.tokens.addEventListener("keydown", (event) => moveAmongWords(plate, event));
    plates.push(plate);
  }

  function holdClip(hold) {
    clipPlaying = !hold;
    clipClock = performance.now() - 1000 * (heldFrame / (plates[0].step?.frame?.fps ?? 8));
    for (const plate of plates) {
      plate.hold.textContent = hold ? "Play clip" : "Pause clip";
      plate.hold.setAttribute("aria-pressed", String(hold));
    }
    drawFrames();
  }

  function render() {
    clearTimeout(drawTimer);
    drawTimer = null;
    drawnAt = performance.now();
    const first = runs.get(shown[0]);
    if (!first) return;
    const total = Math.max(...shown.map((id) => runs.get(id).meta.total));
    const newest = Math.max(0, ...shown.map((id) => newestIndex(runs.get(id))));
    at = Math.min(at, newest);
    shown.forEach((id, i) => renderPlate(plates[i], runs.get(id)));
    renderBar(first, total);
    renderSquare();
    renderCurves(total);
    renderTools();
    const last = runs.get(shown.at(-1));
    putAttributes(root, {
      "data-step": at,
      "data-run": last.id,
      "data-have": held(last),
      "data-state": shown.some((id) => runs.get(id).state === "running") ? "running" : last.state,
    });
    drawFrames(true);
  }

  function renderPlate(plate, run) {
    const step = nearestStep(run, at);
    plate.run = run;
    const prompt = run.meta.prompt || (run.meta.task === "understand" ? "Describe this clip" : "No prompt");
    put(plate.prompt, { textContent: prompt, title: prompt });
    put(plate.facts, {
      textContent: run.meta.parent ? "branch from step " + (run.meta.branch_at + 1)
        : run.meta.seed == null ? "" : "seed " + run.meta.seed,
    });
    put(plate.title, { textContent: run.meta.task === "generate" ? "Prompt, as the model reads it" : "Caption" });
    if (!step) return;
    if (plate.step !== step || plate.kind !== kind) {
      plate.step = step;
      plate.kind = kind;
      renderWords(plate, step, stepOf(run, step.index - 1));
      drawStrip(plate);
      if (looking?.plate === plate) lookAgain();
    }
  }

  function renderWords(plate, step, before) {
    const words = kind === "noisy" ? step.noisy_tokens : step.tokens.map((token) => token[0]);
    const wordsBefore = before && (kind === "noisy" ? before.noisy_tokens : before.tokens.map((token) => token[0]));
    const clickable = Boolean(host?.attend && step.kept && words.length);
    if (plate.words.length !== words.length) {
      plate.words = words.map((_, i) => {
        const gap = document.createElement("span");
        const word = document.createElement("span");
        word.className = "uvg-word";
        word.dataset.token = i;
        return { gap, word };
      });
      plate.tokens.replaceChildren(...plate.words.flatMap(({ gap, word }) => [gap, word]));
    }
    const end = kind === "noisy" ? words.length : words.findIndex((word) => word === "");
    plate.words.forEach(({ gap, word }, i) => {
      const text = words[i];
      const bare = text.trimStart();
      const sure = kind === "noisy" ? 0 : step.tokens[i][1];
      const isNew = Boolean(wordsBefore) && wordsBefore[i] !== text && text !== "";
      put(gap, { textContent: text.length > bare.length || text === "" || words[i - 1] === "" ? " " : "" });
      put(word, {
        textContent: bare === "" ? "·" : bare,
        title: (kind === "noisy" ? "noisy state" : Math.round(100 * sure) + " % sure") + (isNew ? ", changed at this step" : ""),
      });
      putStyle(word, "--c", sure.toFixed(2));
      word.classList.toggle("is-new", isNew);
      word.classList.toggle("is-end", bare === "" || (end >= 0 && i >= end));
      word.classList.toggle("is-unsure", kind === "clean" && sure < 0.5 && bare !== "" && (end < 0 || i < end));
      if (clickable) {
        putAttributes(word, {
          role: "button",
          tabindex: i === (plate.focusedWord ?? 0) ? 0 : -1,
          "aria-pressed": looking?.plate === plate && looking.token === i,
        });
      } else {
        word.removeAttribute("role");
        word.removeAttribute("tabindex");
        word.removeAttribute("aria-pressed");
      }
    });
    if (!words.length) {
      const nothing = document.createElement("span");
      nothing.className = "uvg-placeholder";
      nothing.textContent = "This run carries no caption.";
      plate.tokens.replaceChildren(nothing);
    }
  }

  function drawStrip(plate) {
    const step = plate.step;
    if (!step.frame) return;
    const image = picture(step, kind);
    const { width, height, count } = step.frame;
    putStyle(plate.element, "--uvg-count", count);
    putStyle(plate.element, "--uvg-aspect", width + " / " + height);
    plate.frame.classList.toggle("is-large", width > 160);
    if (!image.complete) {
      image.onload = () => plate.step === step && (drawStrip(plate), drawFrames(true));
      return;
    }
    // The noisy picture may have been made smaller than the clean one, so cells are cut by the picture's own size.
    const cell = image.naturalWidth / count;
    const gap = Math.max(1, Math.round(cell / 24));
    const strip = plate.strip;
    put(strip, { width: Math.floor(count * (cell + gap)), height: image.naturalHeight });
    const pen = strip.getContext("2d");
    pen.clearRect(0, 0, strip.width, strip.height);
    const heat = heatFor(plate);
    for (let i = 0; i < count; i++) {
      pen.drawImage(image, i * cell, 0, cell, strip.height, i * (cell + gap) + gap / 2, 0, cell, strip.height);
      if (heat) pen.drawImage(heat.cells[Math.min(i, heat.cells.length - 1)], i * (cell + gap) + gap / 2, 0, cell, strip.height);
    }
    const what = kind === "noisy" ? "the noisy state" : "the model's clean guess";
    strip.setAttribute("aria-label", count + " frames of " + what + " at step " + (step.index + 1));
    plate.frame.setAttribute("aria-label", "Clip: " + what + " at step " + (step.index + 1) + " of " + step.total);
  }

  function drawFrames(force) {
    const now = performance.now();
    shown.forEach((_, i) => {
      const plate = plates[i];
      const step = plate.step;
      if (!step?.frame) return;
      const { count, fps } = step.frame;
      if (clipPlaying && i === 0) heldFrame = Math.floor(((now - clipClock) / 1000) * fps) % count;
      const frame = clipPlaying ? Math.floor(((now - clipClock) / 1000) * fps) % count : Math.min(heldFrame, count - 1);
      if (!force && plate.frameShown === frame) return;
      const image = picture(step, kind);
      if (!image.complete || !image.naturalWidth) return;
      const cell = image.naturalWidth / count;
      put(plate.frame, { width: Math.floor(cell), height: image.naturalHeight });
      plate.frame.getContext("2d").drawImage(image, frame * cell, 0, cell, image.naturalHeight, 0, 0, cell, image.naturalHeight);
      plate.frameShown = frame;
      plate.element.dataset.frame = frame;
      plate.element.dataset.drawn = step.index + ":" + kind;
      plate.marker.style.transform = "translateX(" + 100 * frame + "%)";
      const heat = heatFor(plate);
      plate.heat.hidden = !heat;
      if (heat) {
        const source = heat.cells[Math.min(frame, heat.cells.length - 1)];
        plate.heat.width = source.width;
        plate.heat.height = source.height;
        plate.heat.getContext("2d").drawImage(source, 0, 0);
      }
    });
  }

  function renderBar(first, total) {
    const range = find(".uvg-range");
    const step = nearestStep(first, at);
    put(range, { disabled: !step, max: String(Math.max(1, total - 1)) });
    put(range, { value: String(at) });
    // on the range alone: whatever inherits a changed property is styled anew
    putStyle(range, "--uvg-at", total > 1 ? (at / (total - 1)).toFixed(4) : "0");
    if (!step) return;
    const taus = [step.tau_video.toFixed(2), step.tau_text.toFixed(2)];
    range.setAttribute("aria-valuetext", "step " + (at + 1) + " of " + total + ", clip time " + taus[0] + ", caption time " + taus[1]);
    put(find(".uvg-where b"), { textContent: "Step " + (at + 1) });
    put(find(".uvg-where .uvg-of"), { textContent: " of " + total });
    put(find(".uvg-where .uvg-v"), { textContent: " clip τ " + taus[0] });
    put(find(".uvg-where .uvg-t"), { textContent: " caption τ " + taus[1] });
    const running = shown.map((id) => runs.get(id)).find((run) => run.state === "running");
    let left = "";
    if (running) {
      const done = running.steps.filter(Boolean).length;
      const seconds = ((performance.now() - running.startedAt) / 1000 / Math.max(1, done - 1)) * (running.meta.total - 1 - newestIndex(running));
      left = done < 2 ? "running" : seconds < 1.5 ? "about a second left" : "about " + Math.round(seconds) + " s left";
    } else if (first.state === "stopped") left = "stopped";
    put(find(".uvg-left"), { textContent: left });
    putAttributes(find(".uvg-live"), { "aria-pressed": live });
  }

  // Make a group hold these shapes, [name, attributes] each, in the nodes that it has where they fit.
  function draw(group, shapes) {
    while (group.children.length > shapes.length) group.lastChild.remove();
    shapes.forEach(([name, attributes], i) => {
      let node = group.children[i];
      if (node?.tagName !== name) {
        const made = document.createElementNS(SVG, name);
        if (node) node.replaceWith(made);
        else group.append(made);
        node = made;
      }
      putAttributes(node, attributes);
    });
  }

  function renderSquare() {
    const nodes = [];
    shown.forEach((id, i) => {
      const run = runs.get(id);
      const second = i ? " uvg-second" : "";
      const spot = (step) => (26 + 114 * step.tau_video).toFixed(1) + " " + (124 - 114 * step.tau_text).toFixed(1);
      const steps = [];
      for (let k = 0; k <= newestIndex(run); k++) if (stepOf(run, k)) steps.push(stepOf(run, k));
      if (!steps.length) return;
      const [video, text] = { generate: [0, 1], understand: [1, 0], joint: [0, 0] }[run.meta.task] ?? [0, 0];
      const start = { tau_video: video, tau_text: text };
      const walked = steps.filter((step) => step.index <= at);
      nodes.push(["path", { class: "uvg-ahead", d: "M" + [start, ...steps].map(spot).join("L") }]);
      nodes.push(["path", { class: "uvg-walked" + second, d: "M" + [start, ...walked].map(spot).join("L") }]);
      const [x, y] = spot(walked.at(-1) ?? start).split(" ");
      nodes.push(["circle", { class: second.trim(), cx: x, cy: y, r: 5.5 }]);
    });
    draw(find(".uvg-paths"), nodes);
  }

  function renderCurves(total) {
    const nodes = [];
    const clip = [];
    const caption = [];
    shown.forEach((id, i) => {
      const run = runs.get(id);
      const newest = newestIndex(run);
      const end = stepOf(run, newest);
      if (!end) return;
      if (run.curvesFor !== newest) {
        run.curvesFor = newest;
        run.curves = [];
        for (let k = 0; k <= newest; k++) {
          const step = stepOf(run, k);
          if (step) run.curves.push({ k, video: distance(step, end), text: tokensToChange(step, end) });
        }
      }
      const scale = { video: Math.max(1e-6, ...run.curves.map((c) => c.video)), text: Math.max(1, ...run.curves.map((c) => c.text)) };
      const line = (what) => "M" + run.curves.map((c) => ((300 * c.k) / Math.max(1, total - 1)).toFixed(1) + " " +
        (94 - (86 * c[what]) / scale[what]).toFixed(1)).join("L");
      const second = i ? " uvg-second" : "";
      if (run.meta.task !== "understand") nodes.push(["path", { class: "uvg-video" + second, d: line("video") }]);
      if (run.meta.task !== "generate") nodes.push(["path", { class: "uvg-text" + second, d: line("text") }]);
      const here = run.curves.findLast((c) => c.k <= at) ?? run.curves[0];
      if (run.meta.task !== "understand") clip.push(Math.round((100 * here.video) / scale.video) + " %");
      if (run.meta.task !== "generate") caption.push(here.text);
    });
    put(find(".uvg-key-video"), { hidden: !clip.length, textContent: "clip: " + clip.join(" and ") + " still to go" });
    put(find(".uvg-key-text"), {
      hidden: !caption.length,
      textContent: "caption: " + caption.join(" and ") + (caption.join() === "1" ? " token" : " tokens") + " to change",
    });
    draw(find(".uvg-lines"), nodes);
    const x = (300 * at) / Math.max(1, total - 1);
    putAttributes(find(".uvg-cursor"), { x1: x, x2: x });
  }

  function renderTools() {
    const run = runs.get(shown.at(-1));
    const step = nearestStep(run, at);
    const { task } = run.meta;
    const running = run.state === "running";
    const branch = find(".uvg-branch");
    put(branch, { hidden: !host?.trigger || !step?.kept });
    if (!branch.hidden) {
      const last = at >= run.meta.total - 1;
      put(find("button", branch), {
        disabled: last || running,
        textContent: running ? "Run on from here" : last ? "Pick an earlier step first" : "Run on from step " + (step.index + 1),
      });
      put(find(".uvg-branch-caption", branch), { hidden: task === "generate" });
      put(find(".uvg-check", branch), { hidden: task === "generate" });
      put(find(".uvg-branch-prompt", branch), { hidden: task === "understand" });
      // Words that someone has begun to edit are theirs; otherwise they follow the step, once there is one to choose.
      if (branch.dataset.touched !== run.id) {
        put(branch.elements.prompt, { value: run.meta.prompt ?? "" });
        put(branch.elements.caption, { value: running ? "" : (step.text ?? "") });
      }
    }
    put(find(".uvg-another"), { hidden: !host?.trigger || !step?.kept, disabled: running });
    put(find(".uvg-take"), { hidden: !host?.take });
    for (const button of root.querySelectorAll('[data-take="mp4"], [data-take="gif"]')) put(button, { hidden: task === "understand" });
    put(find('[data-take="txt"]'), { hidden: task === "generate" });
    put(find(".uvg-compare"), { hidden: find(".uvg-another").hidden && runs.size < 2 });
    put(find(".uvg-legend-click"), { hidden: !host?.attend || !step?.kept });
    put(find(".uvg-tools"), { hidden: !root.querySelector(".uvg-card:not([hidden])") });
    const query = new URLSearchParams({ task, prompt: run.meta.prompt ?? "" });
    if (run.meta.seed != null) query.set("seed", run.meta.seed);
    for (const [key, value] of Object.entries(run.meta.settings ?? {})) query.set(key, value);
    putAttributes(find(".uvg-link"), { href: "?" + query });
    put(find(".uvg-link-row"), { hidden: !host?.take || task === "understand" });
  }

  function listRuns() {
    const select = find(".uvg-beside");
    const choices = [...runs.values()].filter((run) => run.id !== shown[0]);
    const options = choices.map((run) => {
      const option = document.createElement("option");
      option.value = run.id;
      option.textContent = (run.meta.prompt || "clip").slice(0, 40) + (run.meta.seed == null ? "" : ", seed " + run.meta.seed) +
        (run.meta.parent ? ", branch" : "");
      return option;
    });
    select.replaceChildren(select.options[0], ...options);
    select.value = shown[1] ?? "";
  }

  // --------------------------------------------------------------------------------------------------- moving about

  function moveTo(index) {
    const newest = Math.max(0, ...shown.map((id) => newestIndex(runs.get(id))));
    at = Math.max(0, Math.min(index, newest));
    live = false;
    render();
  }

  function stopPlaying() {
    clearInterval(playTimer);
    playTimer = null;
    find(".uvg-play").setAttribute("aria-pressed", "false");
    find(".uvg-play-text").textContent = "Play steps";
  }

  function togglePlaying() {
    if (playTimer) return stopPlaying();
    if (!shown.length) return;
    const newest = () => Math.max(...shown.map((id) => newestIndex(runs.get(id))));
    if (at >= newest()) at = -1;
    moveTo(at + 1);
    find(".uvg-play").setAttribute("aria-pressed", "true");
    find(".uvg-play-text").textContent = "Pause";
    playTimer = setInterval(() => {
      if (at >= newest()) stopPlaying();
      else moveTo(at + 1);
    }, 1000 / STEPS_PER_SECOND);
  }

  function announce(text) {
    find('[data-part="announce"]').textContent = text;
  }

  function note(text) {
    find(".uvg-note").textContent = text ?? "";
  }

  // ---------------------------------------------------------------------------------------------------- look closer

  function heatFor(plate) {
    return looking?.plate === plate && looking.heat && looking.heat.step === plate.step ? looking.heat : null;
  }

  function chooseWord(plate, target) {
    const word = target.closest?.('.uvg-word[role="button"]');
    if (!word) return;
    const token = Number(word.dataset.token);
    plate.focusedWord = token;
    looking = looking?.plate === plate && looking.token === token ? null : { plate, token };
    if (looking) moveHold();
    for (const one of plates) {
      one.kind = null; // draw again
      one.looking.textContent = "";
    }
    render();
  }

  function moveHold() {
    if (playTimer) stopPlaying();
    live = false;
  }

  function lookAgain() {
    const asked = looking;
    const { plate, token } = asked;
    const step = plate.step;
    clearTimeout(asked.timer);
    // While the slider is being dragged, only the step it rests on is asked for.
    asked.timer = setTimeout(async () => {
      step.heats ??= {};
      let heat = step.heats[token];
      if (!heat) {
        const answer = await host.attend({ run: step.run, step: step.index, token });
        if (answer.error) return note(answer.error);
        note("");
        heat = step.heats[token] = { step, cells: shade(answer) };
      }
      if (looking !== asked || plate.step !== step) return;
      asked.heat = heat;
      plate.looking.textContent = "showing where “" + plate.words[token].word.textContent + "” looks";
      root.dataset.looking = step.index + ":" + token;
      drawStrip(plate);
      drawFrames(true);
    }, asked.heat ? 120 : 0);
  }

  // Where the word looks stays bright, the rest goes dark: readable without telling colours apart.
  function shade({ heat, count, height, width }) {
    const values = bytes(heat);
    return Array.from({ length: count }, (_, f) => {
      const cell = document.createElement("canvas");
      cell.width = width;
      cell.height = height;
      const pen = cell.getContext("2d");
      const pixels = pen.createImageData(width, height);
      for (let i = 0; i < width * height; i++) pixels.data[4 * i + 3] = 0.86 * (255 - values[f * width * height + i]);
      pen.putImageData(pixels, 0, 0);
      return cell;
    });
  }

  function moveAmongWords(plate, event) {
    const here = Number(event.target.dataset?.token);
    if (Number.isNaN(here)) return;
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") chooseWord(plate, event.target);
    else if (to === undefined) return;
    else if (plate.words[to]) {
      plate.focusedWord = to;
      event.target.tabIndex = -1;
      plate.words[to].word.tabIndex = 0;
      plate.words[to].word.focus();
    }
    event.preventDefault();
    event.stopPropagation();
  }

  // ------------------------------------------------------------------------------------------------------- controls

  find(".uvg-range").addEventListener("input", (event) => {
    stopPlaying();
    moveTo(Number(event.target.value));
  });
  find(".uvg-play").addEventListener("click", togglePlaying);
  find(".uvg-live").addEventListener("click", () => {
    live = true;
    stopPlaying();
    at = Math.max(0, ...shown.map((id) => newestIndex(runs.get(id))));
    render();
  });
  find(".uvg-kinds").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    kind = button.dataset.kind;
    for (const one of find(".uvg-kinds").children) one.setAttribute("aria-pressed", String(one === button));
    for (const id of shown) for (const step of runs.get(id).steps) if (step) picture(step, kind);
    render();
  });
  root.addEventListener("keydown", (event) => {
    if (event.target.matches("input:not([type=range]), textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const newest = Math.max(0, ...shown.map((id) => newestIndex(runs.get(id))));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: newest }[event.key];
    if (to !== undefined) {
      stopPlaying();
      moveTo(to);
    } else if (event.key === " " && !event.target.matches("button, a")) togglePlaying();
    else return;
    event.preventDefault();
  });
  find(".uvg-beside").addEventListener("change", (event) => {
    show(event.target.value ? [shown[0], event.target.value] : [shown[0]]);
    render();
  });
  find(".uvg-another").addEventListener("click", () => host.trigger("another", { run: shown.at(-1) }));
  const branch = find(".uvg-branch");
  branch.addEventListener("input", () => (branch.dataset.touched = shown.at(-1)));
  branch.addEventListener("submit", (event) => {
    event.preventDefault();
    const run = runs.get(shown.at(-1));
    const step = nearestStep(run, at);
    const touched = branch.dataset.touched === run.id;
    const { prompt, caption, pin } = branch.elements;
    host.trigger("branch", {
      run: run.id,
      step: step.index,
      prompt: prompt.value,
      caption: touched && caption.value !== step.text ? caption.value : null,
      pin: pin.checked,
    });
    branch.dataset.touched = "";
  });
  find(".uvg-files").addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    button.disabled = true;
    const answer = await host.take({ runs: shown, kind: button.dataset.take });
    button.disabled = false;
    if (answer.error) return note(answer.error);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes(answer.data)], { type: answer.mime }));
    link.download = answer.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    note("");
  });

  addPlate();
  holdClip(!clipPlaying);
  renderEmpty();
  (function tick() {
    if (!root.isConnected) return;
    if (clipPlaying) drawFrames();
    setTimeout(() => requestAnimationFrame(tick), untilNextFrame());
  })();

  // To ask for every frame of the screen would keep it, and a core, busy sixty times a second for eight pictures.
  function untilNextFrame() {
    const rates = shown.map((_, i) => plates[i].step?.frame?.fps ?? 8);
    const period = 1000 / Math.max(8, ...rates);
    return period - ((performance.now() - clipClock) % period);
  }

  function renderEmpty() {
    find(".uvg-tokens").textContent = "";
    const nothing = document.createElement("span");
    nothing.className = "uvg-placeholder";
    nothing.textContent = "The caption appears here, each word shaded by how sure the model is.";
    find(".uvg-tokens").append(nothing);
  }

  return { receive };
}
