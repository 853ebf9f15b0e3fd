"use strict";
// The run page: one slider moves the sample grids, the curves' cursor and the strip of one face.
(() => {
  const root = document.getElementById("run");
  if (!root) return;
  const $ = id => document.getElementById(id);
  const slider = $("slider"), STRIP = 56, PADDING = 2, COLUMNS = 8;
  const MAX_BYTES = 320e6, AT_ONCE = 4;
  const state = { runs: [], positions: [], at: -1, follow: true, zoom: "fit", mode: "side", link: "epoch", face: 0, split: .5, blink: 0, anchor: null, unit: { name: "h", per: 1 } };
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let tag = null;

  // --- bitmaps: loaded near the slider first, the least recently used go ---------------------
  const bitmaps = new Map();
  let bytes = 0, running = 0, wanted = [];

  function touch(url) {
    const kept = bitmaps.get(url);
    if (!kept) return null;
    bitmaps.delete(url); bitmaps.set(url, kept);
    return kept.bitmap;
  }

  async function load(url) {
    if (bitmaps.has(url)) return;
    const kept = { bitmap: null };
    bitmaps.set(url, kept);
    running++;
    try {
      const answer = await fetch(url);
      if (!answer.ok) throw new Error(answer.status);
      kept.bitmap = await createImageBitmap(await answer.blob());
      bytes += kept.bitmap.width * kept.bitmap.height * 4;
      while (bytes > MAX_BYTES && bitmaps.size > 8) {
        const [old, gone] = bitmaps.entries().next().value;
        bitmaps.delete(old);
        if (gone.bitmap) { bytes -= gone.bitmap.width * gone.bitmap.height * 4; gone.bitmap.close(); }
      }
    } catch { kept.failed = true; }
    running--;
    pump();
    paintSoon();
  }

  function pump() {
    while (running < AT_ONCE && wanted.length) load(wanted.shift());
  }

  function want() {
    const near = [];
    for (const run of state.runs) {
      const here = sampleAt(run);
      const biggest = touch(run.samples[Math.max(here, 0)]?.url);
      const room = biggest ? Math.max(3, Math.floor(MAX_BYTES / state.runs.length / (biggest.width * biggest.height * 4))) : 400;
      for (let away = 0; away < Math.min(run.samples.length, room); away++)
        for (const index of away ? [here + away, here - away] : [here])
          if (run.samples[index] && !bitmaps.has(run.samples[index].url)) near.push([away, run.samples[index].url]);
    }
    wanted = near.sort((a, b) => a[0] - b[0]).map(one => one[1]);
    pump();
  }

  // --- the linked axis ------------------------------------------------------------------------
  function along(run, epoch) {
    if (state.link === "images") return run.images_per_epoch ? epoch * run.images_per_epoch : epoch;
    if (state.link === "hours") return hours(run, epoch);
    return epoch;
  }

  function hours(run, epoch) {
    const x = run.data && run.data.x;
    if (!x || !x.epoch || !x.epoch.length) return epoch;
    let low = 0, high = x.epoch.length - 1;
    while (low < high) { const mid = (low + high) >> 1; if (x.epoch[mid] < epoch) low = mid + 1; else high = mid; }
    return x.hours[low] * state.unit.per;
  }

  function chooseUnit() {
    const longest = Math.max(0, ...state.runs.map(run => run.data?.x.hours?.at(-1) || 0));
    state.unit = longest * 3600 < 120 ? { name: "s", per: 3600 } : longest * 60 < 120 ? { name: "min", per: 60 } : { name: "h", per: 1 };
  }

  function sampleAt(run) {
    const value = state.positions[state.at];
    let found = -1;
    for (let i = 0; i < run.samples.length && along(run, run.samples[i].epoch) <= value + 1e-9; i++) found = i;
    return found;
  }

  // The place is an epoch of a run, which stays when the axis or its unit changes.
  function anchor() {
    const value = state.positions[state.at];
    for (const run of state.runs)
      for (const one of run.samples)
        if (Math.abs(along(run, one.epoch) - value) < 1e-9) return { run, epoch: one.epoch };
    return null;
  }

  function place() {
    chooseUnit();
    const all = new Set();
    for (const run of state.runs) for (const one of run.samples) all.add(along(run, one.epoch));
    state.positions = [...all].sort((a, b) => a - b);
    const last = state.positions.length - 1;
    slider.max = Math.max(last, 0);
    if (state.follow || !state.anchor) state.at = last;
    else {
      const before = along(state.anchor.run, state.anchor.epoch);
      state.at = Math.max(0, state.positions.findLastIndex(one => one <= before + 1e-9));
    }
    if (state.follow || state.anchor?.run.samples.length) state.anchor = anchor();
    slider.value = state.at;
    const some = last >= 0;
    if (!some) $("nothing").textContent = root.dataset.url === undefined ? "This run has no sample grid." : nothingYet();
    for (const id of ["sliderbox", "grids", "zoom", "link"]) $(id).hidden = !some;
    $("nothing").hidden = some; $("here").hidden = !some;
  }

  function go(at, byHand = true) {
    const last = state.positions.length - 1;
    state.at = Math.max(0, Math.min(last, at));
    state.anchor = anchor();
    slider.value = state.at;
    if (byHand) { state.follow = state.at === last && alive(); followButton(); }
    remember();
    paint();
    want();
  }

  function toEpoch(epoch) {
    const value = along(state.runs[0], epoch);
    go(Math.max(0, state.positions.findLastIndex(one => one <= value + 1e-9)));
  }

  // The fragment of the address has the epoch, so that a reload or a sent link shows the same grid.
  let remembering = 0;
  function remember() {
    clearTimeout(remembering);
    remembering = setTimeout(() => {
      const epoch = state.follow || state.at === state.positions.length - 1 ? "" : `#epoch=${state.anchor?.epoch}`;
      if (epoch !== location.hash) history.replaceState(null, "", epoch || location.pathname + location.search);
    }, 120);
  }
  const remembered = () => Number(/^#epoch=(\d{1,9})$/.exec(location.hash)?.[1] || 0);
  addEventListener("hashchange", () => { if (remembered() && state.positions.length) toEpoch(remembered()); });

  function nothingYet() {
    const one = state.runs[0].state;
    if (one === "queued") return "It has not started. The first sample grid appears with the first checkpoint.";
    if (one === "running") return "The first sample grid appears with the first checkpoint.";
    return `It ${one === "failed" ? "failed" : one === "cancelled" ? "was cancelled" : "ended"} without a sample grid.`;
  }

  const alive = () => state.runs.some(run => run.state === "running" || run.state === "queued");

  function followButton() {
    $("follow").hidden = !alive();
    $("follow").setAttribute("aria-pressed", state.follow);
  }

  // --- painting -------------------------------------------------------------------------------
  let due = 0;
  function paintSoon() { if (!due) due = requestAnimationFrame(() => { due = 0; paint(); }); }

  function cell(run, bitmap) {
    const fits = run.side && bitmap.width > run.side;
    const side = fits ? run.side : Math.floor((bitmap.width - PADDING) / COLUMNS) - PADDING;
    return { side, columns: Math.max(1, Math.floor((bitmap.width - PADDING) / (side + PADDING))) };
  }

  function corner(run, bitmap, index) {
    const { side, columns } = cell(run, bitmap);
    return [PADDING + (index % columns) * (side + PADDING), PADDING + Math.floor(index / columns) * (side + PADDING), side];
  }

  function current(run) {
    const index = sampleAt(run);
    return index < 0 ? null : { sample: run.samples[index], bitmap: touch(run.samples[index].url) };
  }

  function scale(canvas, bitmap) {
    const box = canvas.parentElement;
    let factor = state.zoom;
    if (factor === "fit") {
      const room = box.parentElement.clientWidth / bitmap.width, high = innerHeight * .8 / bitmap.height;
      factor = Math.min(room, Math.max(high, .2));
      if (factor > 1) factor = Math.floor(factor * 2) / 2;
    }
    canvas.style.width = Math.round(bitmap.width * factor) + "px";
    canvas.style.imageRendering = factor < 1 ? "auto" : "pixelated";
  }

  function draw(run, canvas, bitmap, over) {
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) { canvas.width = bitmap.width; canvas.height = bitmap.height; }
    const ctx = canvas.getContext("2d");
    ctx.drawImage(bitmap, 0, 0);
    if (over) {
      const cut = Math.round(bitmap.width * state.split);
      if (cut < bitmap.width) ctx.drawImage(over, Math.round(over.width * state.split), 0, over.width - Math.round(over.width * state.split), over.height, cut, 0, bitmap.width - cut, bitmap.height);
      ctx.fillStyle = "#fff"; ctx.fillRect(cut - 1, 0, 2, bitmap.height);
    }
    const [left, top, side] = corner(run, bitmap, state.face);
    ctx.strokeStyle = getComputedStyle(root).getPropertyValue("--focus"); ctx.lineWidth = PADDING;
    ctx.strokeRect(left - 1, top - 1, side + 2, side + 2);
    scale(canvas, bitmap);
  }

  function paint() {
    if (state.at < 0) return;
    const shown = state.runs.map(current);
    const said = shown.map(now => now ? `epoch ${now.sample.epoch}` : "no grid yet");
    // All of them first: a grid is drawn as wide as the others leave room for.
    state.runs.forEach((run, i) => { run.box.hidden = (state.mode === "blink" && i !== state.blink % state.runs.length) || (state.mode === "split" && i > 0); });
    state.runs.forEach((run, i) => {
      const now = shown[i];
      run.caption.textContent = said[i];
      if (run.over) { run.over.hidden = state.mode !== "split"; run.over.lastChild.textContent = said[1]; }
      run.canvas.setAttribute("aria-label", `sample grid of ${run.name}, ${now ? "epoch " + now.sample.epoch : "none yet"}`);
      run.canvas.toggleAttribute("aria-busy", Boolean(now && !now.bitmap));
      if (now && now.bitmap && !run.box.hidden)
        draw(run, run.canvas, now.bitmap, state.mode === "split" && i === 0 && shown[1] ? shown[1].bitmap : null);
    });
    where();
    strip();
    cursors();
    marksNow();
    actionsHere();
  }

  function measure(run, epoch) {
    const list = run.data ? run.data.evaluations : [];
    let found = null;
    for (const one of list) if (one.epoch <= epoch) found = one;
    return found;
  }

  function span(text, tagName = "span") { const one = document.createElement(tagName); one.textContent = text; return one; }

  function where() {
    const run = state.runs[0], now = current(run) || current(state.runs.find(one => one.samples.length) || run);
    if (!now) return;
    const parts = [span(`epoch ${now.sample.epoch}`, "b")];
    if (run.epochs) parts.push(span(`of ${run.epochs.toLocaleString("en")}`));
    if (run.images_per_epoch) parts.push(span(`${Math.round(now.sample.epoch * run.images_per_epoch).toLocaleString("en")} images seen`));
    const found = measure(run, now.sample.epoch);
    if (found) parts.push(span(`${found.key.split("/")[0]} ${found.value.toPrecision(3)}${found.epoch === now.sample.epoch ? "" : " at " + found.epoch}`));
    if (run.best && run.best.epoch === now.sample.epoch) parts.push(span("★ best"));
    else if (run.best) {
      const best = button(`★ best at ${run.best.epoch}`, { class: "link" });
      best.addEventListener("click", () => toEpoch(run.best.epoch));
      parts.push(best);
    }
    if (parts.map(one => one.textContent).join(" ") === $("where").textContent) return;  // a button under the finger stays
    $("where").replaceChildren(...parts.flatMap((one, i) => i ? [" ", one] : [one]));
    slider.setAttribute("aria-valuetext", $("where").textContent);
  }

  function strip() {
    const canvas = $("face"), run = state.runs[0];
    const wide = canvas.clientWidth, ratio = devicePixelRatio || 1;
    if (!wide || !run.samples.length) return;
    if (canvas.width !== Math.round(wide * ratio)) { canvas.width = Math.round(wide * ratio); canvas.height = Math.round(STRIP * ratio); }
    const ctx = canvas.getContext("2d"), size = canvas.height;
    const places = Math.max(1, Math.min(run.samples.length, Math.floor(canvas.width / (size + 2 * ratio))));
    ctx.imageSmoothingEnabled = false;
    ctx.clearRect(0, 0, canvas.width, canvas.height);
    const here = sampleAt(run);
    run.strip = [];
    for (let i = 0; i < places; i++) {
      const index = places === 1 ? run.samples.length - 1 : Math.round(i * (run.samples.length - 1) / (places - 1));
      run.strip.push(index);
      const bitmap = touch(run.samples[index].url), left = Math.round(i * (size + 2 * ratio));
      if (bitmap) { const [x, y, side] = corner(run, bitmap, state.face); ctx.drawImage(bitmap, x, y, side, side, left, 0, size, size); }
    }
    let near = 0;
    run.strip.forEach((index, i) => { if (Math.abs(index - here) < Math.abs(run.strip[near] - here)) near = i; });
    ctx.strokeStyle = getComputedStyle(root).getPropertyValue("--focus"); ctx.lineWidth = 3 * ratio;
    ctx.strokeRect(near * (size + 2 * ratio) + 1.5 * ratio, 1.5 * ratio, size - 3 * ratio, size - 3 * ratio);
    run.stripStep = (size + 2 * ratio) / ratio;
  }

  // --- marks on the slider's track ---------------------------------------------------------------
  const SVG = "http://www.w3.org/2000/svg";
  function svg(name, attributes, text) {
    const one = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    if (text) one.textContent = text;
    return one;
  }

  function across(value) {
    const all = state.positions, wide = $("marks").clientWidth - 16;
    let at = all.findIndex(one => one >= value - 1e-9);
    if (at < 0) at = all.length - 1;
    if (at > 0 && all[at] > value) at -= (all[at] - value) / (all[at] - all[at - 1]);
    return 8 + (all.length > 1 ? at / (all.length - 1) : .5) * wide;
  }

  function marks() {
    const place = $("marks"), run = state.runs[0];
    place.replaceChildren();
    if (!run || !run.data || !state.positions.length) return;
    for (const one of run.checkpoints) place.append(svg("line", { class: "kept", x1: across(along(run, one.epoch)), x2: across(along(run, one.epoch)), y1: 28, y2: 34 }));
    const list = run.data.evaluations.filter(one => one.value !== null);
    if (list.length) {
      const values = list.map(one => one.value), low = Math.min(...values), high = Math.max(...values);
      const y = value => 24 - (high > low ? (value - low) / (high - low) : .5) * 16;
      const points = list.map(one => [across(along(run, one.epoch)), y(one.value)]);
      place.append(svg("polyline", { class: "line", points: points.map(one => one.map(v => v.toFixed(1)).join(",")).join(" ") }));
      for (const [x, top] of points) place.append(svg("circle", { class: "dot", cx: x, cy: top, r: 2.2 }));
      if (run.best) {
        const best = list.find(one => one.epoch === run.best.epoch);
        const star = svg("text", { class: "best", x: across(along(run, run.best.epoch)), y: (best ? y(best.value) : 24) + 5 }, "★");
        star.addEventListener("click", () => toEpoch(run.best.epoch));
        place.append(star);
      }
    }
    place.append(svg("line", { class: "now", id: "now", y1: 0, y2: 34 }));
    marksNow();
  }

  function marksNow() {
    const now = $("now");
    if (!now) return;
    const x = across(state.positions[state.at]);
    now.setAttribute("x1", x); now.setAttribute("x2", x);
  }

  // --- what can be done from here ---------------------------------------------------------------
  function button(text, attributes) {
    const one = document.createElement("button");
    one.type = "button"; one.textContent = text;
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    return one;
  }

  let hereKey = "", count = 1000;
  const number = Object.assign(document.createElement("input"), { type: "number", min: 1, value: count });
  number.setAttribute("aria-label", "Number of images");
  number.addEventListener("input", () => { count = Math.max(1, Math.floor(Number(number.value)) || 1); actionsHere(); });
  const generate = button("", {}), shown = span("", "code"), copied = button("Copy", {}), line = document.createElement("div");
  shown.className = "command"; shown.tabIndex = 0; shown.setAttribute("role", "region"); shown.setAttribute("aria-label", "Command");
  if (root.dataset.changes === "1") line.append(number, span("images"), generate);
  function actionsHere() {
    const run = state.runs[0], now = current(run);
    if (!now) return;
    const kept = run.checkpoints.map(one => one.epoch);
    const key = `${now.sample.epoch} ${kept} ${count}`;
    if (key === hereKey) return;
    hereKey = key;
    const near = kept.length ? kept.reduce((a, b) => Math.abs(b - now.sample.epoch) < Math.abs(a - now.sample.epoch) ? b : a) : null;
    if (near === null) { $("here").replaceChildren(span("no checkpoint is kept yet", "span")); return; }
    const command = `ganq submit generate --from ${run.id} --checkpoint ${near} --count ${count}`;
    generate.textContent = `Generate from epoch ${near}${near === now.sample.epoch ? "" : ", the nearest kept"}`;
    generate.dataset.action = `/jobs/${run.id}/generate`;
    generate.dataset.values = JSON.stringify({ checkpoint: near, count });
    shown.textContent = command;
    copied.dataset.copy = command;
    if (!copied.isConnected) $("here").replaceChildren(...(line.childNodes.length ? [line] : []), shown, copied);
  }

  // --- curves -----------------------------------------------------------------------------------
  const GROUPS = [
    ["Losses", ["loss_d", "loss_g"]], ["Discriminator's scores", ["d_real", "d_fake"]], ["Augmentation", ["augment_p"]],
    ["Images per second", ["images_per_s"]], ["GPU memory", ["gpu_memory", "gpu_memory_bytes"]], ["Penalties", ["r1", "r2"]],
  ];
  const charts = [];

  function groups() {
    const names = new Set(state.runs.flatMap(run => run.data ? Object.keys(run.data.series) : []));
    const found = [];
    const keys = [...new Set(state.runs.flatMap(run => run.data ? run.data.evaluations.map(one => one.key) : []))];
    for (const key of keys) found.push([key, [["evaluation", key]]]);
    if (state.runs.some(run => run.data && run.data.evaluations.some(one => one.diversity !== null))) found.push(["Diversity", [["diversity", null]]]);
    for (const [title, wanted] of GROUPS) {
      const here = wanted.filter(name => names.has(name));
      here.forEach(name => names.delete(name));
      if (here.length) found.push([title, here.map(name => ["series", name])]);
    }
    for (const name of names) found.push([name.replaceAll("_", " "), [["series", name]]]);
    const order = ["Losses", "Discriminator's scores"];
    return found.sort((a, b) => rank(a) - rank(b));
    function rank([title, lines]) { return lines[0][0] === "evaluation" ? 0 : order.includes(title) ? 1 : title === "Diversity" ? 2 : 3; }
  }

  function lineOf(run, [kind, name]) {
    if (!run.data) return { x: [], y: [] };
    if (kind === "series") return { x: xOf(run), y: run.data.series[name] || [] };
    const list = run.data.evaluations.filter(one => kind === "diversity" || one.key === name);
    return { x: list.map(one => along(run, one.epoch)), y: list.map(one => kind === "diversity" ? one.diversity : one.value) };
  }

  function xOf(run) {
    if (state.link !== "hours") return run.data.x[state.link] || [];
    if (run.timed?.of !== run.data || run.timed.unit !== state.unit.name)
      run.timed = { of: run.data, unit: state.unit.name, x: (run.data.x.hours || []).map(one => one * state.unit.per) };
    return run.timed.x;
  }

  // All curves have the range of the runs, so that one x is at one place in all of them.
  function range() {
    const all = state.runs.filter(run => run.data).flatMap(run => {
      const x = xOf(run), list = run.data.evaluations.map(one => along(run, one.epoch));
      return [x[0], x.at(-1), list[0], list.at(-1)].filter(one => one !== undefined && one !== null);
    });
    const low = Math.min(...all), high = Math.max(...all);
    return all.length ? [low, high > low ? high : low + 1] : [0, 1];
  }

  function css(name) { return getComputedStyle(root).getPropertyValue(name).trim(); }

  function curves() {
    const sets = groups(), wanted = sets.map(([title]) => title).join("|") + "|" + state.runs.length + state.link + state.unit.name;
    if (curves.made !== wanted) {
      curves.made = wanted;
      for (const chart of charts.splice(0)) chart.plot.destroy();
      $("curves").replaceChildren();
      for (const [title, lines] of sets) charts.push(chart(title, lines));
    }
    for (const one of charts) one.update();
    cursors();
  }

  function chart(title, lines) {
    const box = document.createElement("section"); box.className = "chart";
    const header = document.createElement("header"), plotbox = document.createElement("div"), table = document.createElement("details");
    plotbox.className = "plot"; plotbox.setAttribute("role", "img"); plotbox.setAttribute("aria-label", title);
    header.append(span(title, "h2"));
    box.classList.toggle("many", state.runs.length * lines.length > 2);
    const drawn = state.runs.flatMap((run, i) => lines.map((line, j) => ({ run, line, colour: state.runs.length > 1 ? i : j, dash: state.runs.length > 1 && j > 0 })));
    for (const one of drawn) {
      const value = document.createElement("span"); value.className = "value";
      const swatch = document.createElement("span"); swatch.className = `swatch c${one.colour}${one.dash ? " dash" : ""}`;
      one.label = [state.runs.length > 1 ? one.run.label : "", lines.length > 1 ? one.line[1].replaceAll("_", " ") : ""].filter(Boolean).join(" ");
      one.text = document.createTextNode("");
      value.append(swatch, " ", one.text); header.append(value);
    }
    table.append(span("Table", "summary"));
    table.addEventListener("toggle", () => { if (table.open) fill(); else table.querySelector(".scroll")?.remove(); });
    box.append(header, plotbox, table);
    $("curves").append(box);
    const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false }, font: "11px " + css("--mono"), labelSize: 0 };
    const plot = new uPlot({
      width: plotbox.clientWidth || 320, height: 96, legend: { show: false }, padding: [6, 8, 0, 0],
      cursor: { show: false }, select: { show: false }, scales: { x: { time: false, range } },
      hooks: { draw: [() => moveCursor()] },  // only then it knows its scales
      axes: [{ ...axis, size: 18, gap: 2, space: 60, ...(state.link === "hours" ? { values: (u, ticks) => ticks.map(v => `${+v.toPrecision(4)} ${state.unit.name}`) } : {}) }, { ...axis, size: 46, gap: 4, space: 26, values: (u, ticks) => ticks.map(v => Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(0) : String(+v.toPrecision(4))) }],
      series: [{}, ...drawn.map(one => ({ stroke: css(`--c${one.colour}`), width: 1.4, dash: one.dash ? [4, 3] : undefined, spanGaps: true, points: { show: one.line[0] !== "series", size: 4 } }))],
    }, [[], ...drawn.map(() => [])], plotbox);
    const cursor = document.createElement("div"); cursor.className = "cursor"; plot.over.append(cursor);
    plot.over.addEventListener("pointerdown", event => {
      const value = plot.posToVal(event.offsetX, "x");
      let best = 0;
      state.positions.forEach((one, i) => { if (Math.abs(one - value) < Math.abs(state.positions[best] - value)) best = i; });
      go(best);
    });
    function update() {
      const series = drawn.map(one => lineOf(one.run, one.line));
      if (series.every(one => one.x === series[0].x)) plot.setData([series[0].x, ...series.map(one => one.y)]);
      else plot.setData(uPlot.join(series.map(one => [one.x, one.y])));
      drawn.forEach((one, i) => { one.data = series[i]; });
      if (table.open) fill();
    }
    function fill() {
      table.querySelector(".scroll")?.remove();
      const scroll = document.createElement("div"); scroll.className = "scroll"; scroll.tabIndex = 0; scroll.setAttribute("role", "region"); scroll.setAttribute("aria-label", title + " as a table");
      const made = document.createElement("table"), head = made.createTHead().insertRow(), body = made.createTBody();
      for (const text of [state.link === "hours" ? `time (${state.unit.name})` : state.link, ...drawn.map(one => one.label || title)]) { const th = document.createElement("th"); th.scope = "col"; th.textContent = text; head.append(th); }
      const [xs, ...ys] = plot.data, step = Math.max(1, Math.ceil(xs.length / 40));
      for (let i = 0; i < xs.length; i += step) {
        const tr = body.insertRow();
        for (const v of [xs[i], ...ys.map(y => y[i])]) tr.insertCell().textContent = v === null || v === undefined ? "" : String(+v.toPrecision(4));
      }
      scroll.append(made); table.append(scroll);
    }
    let at = 0;
    function moveCursor() {
      if (plot.scales.x.min === undefined || plot.scales.x.min === null) return;
      cursor.style.transform = `translateX(${Math.max(0, Math.min(plot.valToPos(at, "x"), plot.over.clientWidth))}px)`;
    }
    function move(value) {
      at = value;
      moveCursor();
      for (const one of drawn) {
        if (!one.data) continue;
        let found = null;
        const { x: xs, y: ys } = one.data;
        let low = 0, high = xs.length;
        while (low < high) { const mid = (low + high) >> 1; if (xs[mid] <= value + 1e-9) low = mid + 1; else high = mid; }
        for (let i = low - 1; i >= 0 && found === null; i--) found = ys[i];
        const text = `${one.label ? one.label + " " : ""}${found === null ? "–" : +found.toPrecision(4)}`;
        if (one.text.data !== text) one.text.data = text;
      }
    }
    return { plot, update, move, resize: () => { if (plotbox.clientWidth) plot.setSize({ width: plotbox.clientWidth, height: 96 }); } };
  }

  function cursors() {
    const value = state.positions.length ? state.positions[state.at] : Infinity;
    for (const one of charts) one.move(value);
  }

  // --- loading ------------------------------------------------------------------------------------
  async function loadFacts() {
    try {
      const answer = await fetch(root.dataset.url, { headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 304 || !answer.ok) return;
      tag = answer.headers.get("ETag");
      const facts = await answer.json(), runs = [facts.run, ...facts.with];
      if (!state.runs.length) {
        boxes(runs);
        if (remembered()) { state.anchor = { run: state.runs[0], epoch: remembered() }; state.follow = false; }
      }
      runs.forEach((one, i) => Object.assign(state.runs[i], one));
      await Promise.all(state.runs.map(async run => {
        const answer = await fetch(run.curves, { headers: run.tag ? { "If-None-Match": run.tag } : {} });
        if (answer.ok) { run.tag = answer.headers.get("ETag"); run.data = await answer.json(); }
      }));
      place(); followButton(); marks(); paint(); want(); curves();
    } catch { /* away: live.js says so */ }
  }

  function boxes(runs) {
    runs.forEach((facts, i) => {
      const box = document.createElement("figure"), caption = document.createElement("figcaption");
      box.className = "gridbox";
      const swatch = document.createElement("span"); swatch.className = `swatch c${i}`;
      const name = span(facts.name, "b"), at = span(""), holder = document.createElement("div"), canvas = document.createElement("canvas");
      at.className = "muted num"; holder.className = "canvasbox"; canvas.className = "grid"; canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", `sample grid of ${facts.name}, none yet`);
      holder.tabIndex = 0; holder.setAttribute("role", "region"); holder.setAttribute("aria-label", `grid of ${facts.name}`);
      caption.append(...(runs.length > 1 ? [swatch, name] : []), at);
      holder.append(canvas); box.append(caption, holder); $("grids").append(box);
      holder.addEventListener("scroll", () => {  // zoomed grids move together
        for (const other of document.querySelectorAll(".canvasbox")) {
          if (other !== holder && (other.scrollLeft !== holder.scrollLeft || other.scrollTop !== holder.scrollTop)) other.scrollTo(holder.scrollLeft, holder.scrollTop);
        }
      }, { passive: true });
      const twice = runs.some(other => other !== facts && other.name === facts.name);
      const run = { ...facts, box, canvas, caption: at, data: null, tag: null, label: twice ? `${facts.name} (${facts.id})` : facts.name };
      name.textContent = run.label;
      if (i === 0 && runs.length > 1) {  // of the right half, when split
        run.over = document.createElement("span"); run.over.className = "over"; run.over.hidden = true;
        const of = document.createElement("span"), epoch = span("");
        of.className = "swatch c1"; epoch.className = "muted num";
        run.over.append(of, span(runs[1].name === facts.name ? `${runs[1].name} (${runs[1].id})` : runs[1].name, "b"), epoch);
        caption.append(run.over);
      }
      canvas.addEventListener("pointerdown", event => {
        const now = current(run);
        if (!now || !now.bitmap) return;
        if (state.mode === "split") return split(event);
        const factor = now.bitmap.width / canvas.clientWidth, { side, columns } = cell(run, now.bitmap);
        const column = Math.floor((event.offsetX * factor - PADDING) / (side + PADDING)), row = Math.floor((event.offsetY * factor - PADDING) / (side + PADDING));
        state.face = Math.max(0, row * columns + Math.max(0, Math.min(columns - 1, column)));
        paint();
      });
      canvas.addEventListener("pointermove", event => { if (state.mode === "split" && event.buttons) split(event); });
      function split(event) { state.split = Math.max(0, Math.min(1, event.offsetX / canvas.clientWidth)); paint(); }
      state.runs.push(run);
    });
    choices("zoom", ["fit", "1", "2", "4"], one => one === "fit" ? "Fit" : one + "×", one => { state.zoom = one === "fit" ? "fit" : Number(one); paint(); });
    if (runs.length > 1) {
      $("mode").hidden = false;
      choices("mode", ["side", "split", "blink"], one => ({ side: "Side by side", split: "Split", blink: "Blink" })[one], one => { state.mode = one; paint(); });
    }
    choices("link", ["epoch", "images", "hours"], one => one === "hours" ? "time" : one, one => { state.link = one; place(); marks(); paint(); want(); curves(); });
    setInterval(() => { if (state.mode === "blink" && !still.matches && !document.hidden) { state.blink++; paint(); } }, 700);
  }

  function choices(id, values, label, choose) {
    const group = $(id);
    for (const value of values) {
      const one = button(label(value), { "aria-pressed": value === values[0], "data-value": value });
      one.addEventListener("click", () => {
        for (const other of group.children) other.setAttribute("aria-pressed", other === one);
        choose(value);
      });
      group.append(one);
    }
  }

  function next(id) {
    const all = [...$(id).children], here = all.findIndex(one => one.getAttribute("aria-pressed") === "true");
    if (all.length) all[(here + 1) % all.length].click();
  }

  slider.addEventListener("input", () => go(Number(slider.value)));
  $("follow").addEventListener("click", () => { state.follow = !state.follow; followButton(); if (state.follow) go(state.positions.length - 1, false); });
  $("face").addEventListener("click", event => {
    const run = state.runs[0];
    if (!run.strip) return;
    const index = run.strip[Math.min(run.strip.length - 1, Math.floor(event.offsetX / run.stripStep))];
    toEpoch(run.samples[index].epoch);
  });
  document.addEventListener("keydown", event => {
    if (ganq.typing(event) || document.querySelector("dialog[open]") || !state.positions.length) return;
    const last = state.positions.length - 1;
    const moves = { ArrowLeft: state.at - 1, ArrowRight: state.at + 1, ArrowUp: state.at + 10, ArrowDown: state.at - 10, Home: 0, End: last };
    if (event.key in moves) go(moves[event.key]);
    else if (event.key === "f") $("follow").click();
    else if (event.key === "z") next("zoom");
    else if (event.key === "m") next("mode");
    else if (event.key === "b" && state.runs[0].best) toEpoch(state.runs[0].best.epoch);
    else return;
    event.preventDefault();
  });
  document.addEventListener("ganq:revision", loadFacts);
  addEventListener("resize", () => { for (const one of charts) one.resize(); marks(); paint(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { curves.made = ""; curves(); paint(); });
  window.ganqRun = { state, go };  // for the tests, and for those who like the console
  loadFacts();
})();
