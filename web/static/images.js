"use strict";
// The gallery: contact sheets of which only those in view are in the page, and a panel for one image.
(() => {
  const root = document.getElementById("gallery");
  if (!root) return;
  const $ = id => document.getElementById(id);
  const facts = JSON.parse(root.dataset.gallery), changes = root.dataset.changes === "1";
  const view = $("view"), space = $("space"), panel = $("panel");
  const state = { order: "index", size: "m", at: 0, stars: new Set(facts.stars), shown: new Map(), numbers: new Map(), open: null, hover: null, picking: false };
  const SIZES = { s: 48, m: 72, l: 150 };

  const count = () => state.order === "starred" ? state.stars.size : facts.count;
  let columns = 16, side = 64, perSheet = 64;

  function layout() {
    const wide = view.clientWidth, wanted = Math.max(1, wide / SIZES[state.size]);
    columns = facts.widths.reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
    side = wide / columns;
    perSheet = columns * facts.rows;
    const high = Math.ceil(count() / columns) * side;
    space.style.height = `${high}px`;
    view.style.height = `${Math.min(Math.max(high, 120), Math.round(innerHeight * .76))}px`;
    for (const img of state.shown.values()) img.remove();
    state.shown.clear();
    render();
  }

  function address(sheet) {
    const stamp = state.order === "starred" ? "-" + [...state.stars].sort((a, b) => a - b).slice(sheet * perSheet, (sheet + 1) * perSheet).join(".").slice(0, 600) : "";
    return `${facts.url}/sheets/${sheet}?columns=${columns}&order=${state.order}&v=${facts.version}${stamp}`;
  }

  function render() {
    const high = side * facts.rows, top = view.scrollTop, bottom = top + view.clientHeight;
    const first = Math.max(0, Math.floor(top / high)), last = Math.min(Math.ceil(count() / perSheet) - 1, Math.floor((bottom + 1) / high));
    for (const [sheet, img] of state.shown) if (sheet < first - 1 || sheet > last + 1) { img.remove(); state.shown.delete(sheet); }
    for (let sheet = first; sheet <= last; sheet++) {
      if (state.shown.has(sheet)) continue;
      const img = document.createElement("img"), from = sheet * perSheet, to = Math.min(from + perSheet, count());
      img.alt = `images ${from} to ${to - 1} by ${state.order}`;
      img.decoding = "async"; img.draggable = false;
      const down = Math.ceil((to - from) / columns);
      img.style.width = `${columns * side}px`; img.style.height = `${down * side}px`;
      img.style.transform = `translateY(${sheet * high}px)`;
      const over = (to - from) % columns;  // the empty places of the last row are black in the file
      if (over) img.style.clipPath = `polygon(0 0, 100% 0, 100% ${(down - 1) * side}px, ${over * side}px ${(down - 1) * side}px, ${over * side}px 100%, 0 100%)`;
      img.src = address(sheet);
      space.prepend(img);
      state.shown.set(sheet, img);
    }
    overlays();
    const here = Math.min(count() - 1, Math.round(top / side) * columns);
    $("position").textContent = count() ? `${(here + 1).toLocaleString("en")}–${Math.min(count(), Math.ceil(bottom / side) * columns).toLocaleString("en")} of ${count().toLocaleString("en")}` : "none is starred yet";
  }

  function overlays() {
    for (const old of space.querySelectorAll(".star, .here")) old.remove();
    if (!count()) return;
    const add = (name, at, text) => {
      const one = document.createElement("div");
      one.className = name; if (text) one.textContent = text;
      one.style.transform = `translate(${(at % columns) * side + (text ? 3 : 0)}px, ${Math.floor(at / columns) * side + (text ? 2 : 0)}px)`;
      if (!text) { one.style.width = `${side}px`; one.style.height = `${side}px`; }
      space.append(one);
    };
    const first = Math.floor(view.scrollTop / side) * columns, last = Math.ceil((view.scrollTop + view.clientHeight) / side) * columns;
    if (state.order === "index") for (const star of state.stars) if (star >= first && star < last) add("star", star, "★");
    if (state.order === "starred") for (let i = first; i < Math.min(last, count()); i++) add("star", i, "★");
    if (state.at < count()) add("here", state.at);
    hoverStar();
    $("zip").classList.toggle("none", !state.stars.size);  // its room stays, so that a star moves nothing
    $("zip").href = `${facts.url}/stars.zip`;
    $("zip").textContent = `Download ${state.stars.size} starred`;
  }

  // The star of the image under the pointer. On a touch screen there is none: there Pick stars by a tap.
  const corner = document.createElement("button");
  corner.type = "button"; corner.className = "corner"; corner.hidden = true; corner.tabIndex = -1;
  async function hoverStar() {
    const place = state.hover, off = !changes || place === null || place >= count();
    corner.hidden = off;
    if (off) return;
    corner.style.transform = `translate(${(place % columns) * side}px, ${Math.floor(place / columns) * side}px)`;
    const number = await numberAt(place);
    if (place !== state.hover) return;
    corner.textContent = state.stars.has(number) ? "★" : "☆";
    corner.setAttribute("aria-label", `${state.stars.has(number) ? "Unstar" : "Star"} image ${number}`);
    if (corner.parentElement !== space) space.append(corner);
  }
  view.addEventListener("pointermove", event => {
    const place = placeOf(event);
    if (event.pointerType === "touch" || place === state.hover) return;
    state.hover = place;
    hoverStar();
  });
  view.addEventListener("pointerleave", () => { state.hover = null; hoverStar(); });

  function pick(on) {
    state.picking = on;
    $("picking").setAttribute("aria-pressed", on);
    view.classList.toggle("picking", on);
  }
  $("picking")?.addEventListener("click", () => pick(!state.picking));

  function placeOf(event) {
    const box = space.getBoundingClientRect();
    return Math.floor((event.clientY - box.top) / side) * columns + Math.floor((event.clientX - box.left) / side);
  }
  async function numberAt(place) {
    if (state.order === "index") return place;
    if (state.order === "starred") return [...state.stars].sort((a, b) => a - b)[place];
    const sheet = Math.floor(place / perSheet), key = address(sheet);
    if (!state.numbers.has(key)) {
      const answer = await fetch(key);
      state.numbers.set(key, (answer.headers.get("X-Ganq-Images") || "").split(",").map(Number));
    }
    return state.numbers.get(key)[place % perSheet];
  }

  function go(place) {
    state.at = Math.max(0, Math.min(count() - 1, place));
    const top = Math.floor(state.at / columns) * side;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + side > view.scrollTop + view.clientHeight) view.scrollTop = top + side - view.clientHeight;
    render();
    if (panel.open) show();
  }

  async function show() {
    const number = await numberAt(state.at);
    if (number === undefined) return;
    const answer = await fetch(`${facts.url}/images/${number}`);
    const about = await answer.json();
    if (!answer.ok) { ganq.note(about.error ? about.error.message : "this image cannot be shown", true); return; }
    state.open = about;
    $("panel-title").textContent = `Image ${about.index.toLocaleString("en")} (${(about.index + 1).toLocaleString("en")} of ${facts.count.toLocaleString("en")})`;
    const picture = $("picture");
    picture.hidden = Boolean(about.problem);
    picture.alt = about.problem ? "" : `image ${about.index}`;
    picture.onload = () => {
      const factor = Math.max(1, Math.min(8, Math.floor(Math.min(innerWidth * .5, 640) / picture.naturalWidth)));
      picture.style.width = `${picture.naturalWidth * factor}px`;
    };
    if (!about.problem) picture.src = about.url;
    const rows = [["seed", about.seed], ["draw", about.draw], ["score", about.score === null || about.score === undefined ? null : about.score.toPrecision(5)], ["class", about.class],
      ["from", about.source === null ? null : `job ${about.source}`], ["checkpoint", about.epoch === null || about.epoch === undefined ? null : `epoch ${about.epoch}`],
      ["checkpoint sha256", about.checkpoint_sha256], ["sha256", about.sha256], ["bytes", about.bytes.toLocaleString("en")], ["file", about.file], ["problem", about.problem]];
    $("about").replaceChildren(...rows.filter(([, value]) => value !== null && value !== undefined).flatMap(([name, value]) => {
      const dt = document.createElement("dt"), dd = document.createElement("dd"), isolated = document.createElement("bdi");
      dt.textContent = name; isolated.textContent = value; dd.append(isolated);
      return [dt, dd];
    }));
    $("command").textContent = about.command;
    $("copy").dataset.copy = about.command;
    $("save").href = about.url; $("save").hidden = Boolean(about.problem);
    $("star").hidden = !changes;
    $("star").textContent = state.stars.has(about.index) ? "★ Starred" : "☆ Star";
    $("star").setAttribute("aria-pressed", state.stars.has(about.index));
    if (!panel.open) panel.showModal();
  }

  async function star(place = state.at) {
    if (!changes) { ganq.note("This server is read-only; stars need ganq web --allow-changes.", true); return; }
    const number = await numberAt(place);
    try {
      const said = await ganq.send(`${facts.url}/star`, { image: number, starred: !state.stars.has(number) });
      state.stars = new Set(said.stars);
    } catch (error) { ganq.note(error.message, true); }
    if (state.order === "starred") layout(); else overlays();
    if (panel.open && state.open && state.open.index === number) { $("star").textContent = state.stars.has(number) ? "★ Starred" : "☆ Star"; $("star").setAttribute("aria-pressed", state.stars.has(number)); }
  }

  function choices(id, values, choose, chosen = values[0][0]) {
    for (const [value, label] of values) {
      const one = document.createElement("button");
      one.type = "button"; one.textContent = label; one.setAttribute("aria-pressed", value === chosen);
      one.addEventListener("click", () => { for (const other of $(id).children) other.setAttribute("aria-pressed", other === one); choose(value); });
      $(id).append(one);
    }
  }

  const orders = [["index", "By number"]];
  if (facts.scored) orders.push(["best", "Best first"], ["worst", "Worst first"]);
  orders.push(["starred", "Starred"]);
  choices("order", orders, value => { state.order = value; state.at = 0; view.scrollTop = 0; layout(); });
  choices("sizes", [["s", "S"], ["m", "M"], ["l", "L"]], value => { state.size = value; const at = state.at; layout(); go(at); }, "m");

  let due = 0;
  view.addEventListener("scroll", () => { if (!due) due = requestAnimationFrame(() => { due = 0; render(); }); }, { passive: true });
  view.addEventListener("click", event => {
    const place = placeOf(event);
    if (place >= count()) return;
    if (event.target === corner || state.picking) { state.at = place; star(place); }
    else { go(place); show(); }
  });
  $("goto").addEventListener("change", () => { if ($("goto").value !== "") { go(Number($("goto").value)); view.scrollTop = Math.floor(state.at / columns) * side; render(); } });
  $("star").addEventListener("click", () => star());
  $("previous").addEventListener("click", () => go(state.at - 1));
  $("next").addEventListener("click", () => go(state.at + 1));
  document.addEventListener("keydown", event => {
    if (ganq.typing(event) || (document.querySelector("dialog[open]") && !panel.open)) return;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (event.key in moves && (panel.open || document.activeElement === view)) go(state.at + moves[event.key]);
    else if (event.key === "Home" && document.activeElement === view) go(0);
    else if (event.key === "End" && document.activeElement === view) go(count() - 1);
    else if (event.key === "Enter" && document.activeElement === view) show();
    else if (event.key === "s") star();
    else if (event.key === "p" && $("picking")) pick(!state.picking);
    else if (event.key === "#") $("goto").focus();
    else return;
    event.preventDefault();
  });
  addEventListener("resize", () => { const at = state.at; layout(); go(at); });
  window.ganqImages = { state, go, layout };
  layout();
})();
