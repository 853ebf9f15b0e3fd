"use strict";
// Live updates, actions and keys of every page. The server notifies that something was committed
// (Server-Sent Events); the page fetches its own live part again and morphs it, so that focus, scroll
// and open details stay.
const ganq = (() => {
  const QUIET_MS = 11000, MAX_PAUSE_MS = 8000;
  const SPACING_MS = 1000;  // the page must not take the processor from a training on the same machine
  const main = document.getElementById("main");
  const liveness = document.getElementById("liveness");
  const banner = document.getElementById("banner");
  let source = null, heard = Date.now(), tag = null, busy = false, again = false, pause = 500, retry = 0;
  let updatedAt = -SPACING_MS, planned = 0;

  function localTimes(root) {
    for (const one of root.querySelectorAll("time[datetime]")) {
      const at = new Date(one.dateTime);
      if (isNaN(at)) continue;
      const today = at.toDateString() === new Date().toDateString();
      one.textContent = today ? at.toLocaleTimeString([], { timeStyle: "medium", hourCycle: "h23" }) : at.toLocaleString([], { dateStyle: "medium", timeStyle: "short", hourCycle: "h23" });  // as in logs
      one.title = at.toLocaleString([], { dateStyle: "full", timeStyle: "long" });
    }
  }

  function showLiveness() {
    const quiet = Date.now() - heard;
    const live = quiet < QUIET_MS && source !== null && source.readyState === EventSource.OPEN;
    const said = document.hidden ? "paused" : live ? "live" : `last seen ${Math.round(quiet / 1000)} s ago`;
    if (liveness.textContent !== said) liveness.textContent = said;
    liveness.className = "liveness " + (live ? "live" : quiet >= QUIET_MS ? "away" : "");
    const away = !document.hidden && quiet >= QUIET_MS;
    if (away && banner.hidden) banner.textContent = "The server does not answer. This page shows what was last seen, and goes on by itself.";
    if (banner.dataset.sticky !== "1") banner.hidden = !away;
  }

  function connect() {
    clearTimeout(retry);
    if (document.hidden || source !== null) return;
    source = new EventSource("/live");
    const hear = () => { heard = Date.now(); pause = 500; showLiveness(); };
    source.onopen = hear;
    source.addEventListener("ping", hear);
    source.addEventListener("revision", () => { hear(); updateSoon(); });
    source.onerror = () => {
      if (source !== null && source.readyState === EventSource.CLOSED) {
        disconnect();
        retry = setTimeout(connect, pause);  // refused, e.g. too many open pages: look all the same
        pause = Math.min(2 * pause, MAX_PAUSE_MS);
        refresh();
      }
      showLiveness();
    };
  }

  function disconnect() {
    if (source !== null) source.close();
    source = null;
  }

  function updateSoon() {
    planned ||= setTimeout(update, Math.max(0, updatedAt + SPACING_MS - performance.now()));
  }

  function update() {
    clearTimeout(planned);
    planned = 0;
    updatedAt = performance.now();
    refresh();
    document.dispatchEvent(new Event("ganq:revision"));
  }

  async function refresh() {
    if (!main || !main.hasAttribute("data-live")) return;
    if (busy) { again = true; return; }
    busy = true;
    try {
      const headers = { "X-Ganq-Fragment": "1", Accept: "text/html" };
      if (tag) headers["If-None-Match"] = tag;
      const answer = await fetch(location.pathname + location.search, { headers });
      if (answer.status === 401) {
        banner.textContent = "You are logged out: ganq open opens the page with its token.";
        banner.dataset.sticky = "1"; banner.hidden = false;
      } else if (answer.ok) {
        heard = Date.now();
        tag = answer.headers.get("ETag");
        morph(await answer.text());
      } else if (answer.status === 304) heard = Date.now();
      else if (answer.status === 404) main.removeAttribute("data-live");  // e.g. archived: asking again does not help
    } catch { /* away: the banner says so */ }
    busy = false;
    showLiveness();
    if (again) { again = false; refresh(); }
  }

  function morph(text) {
    Idiomorph.morph(main, text, {
      morphStyle: "innerHTML", ignoreActiveValue: true,
      callbacks: {
        beforeNodeMorphed: old => !(old.nodeType === 1 && old.hasAttribute("data-keep")),
        beforeAttributeUpdated: (name, node) => name !== "open" && !(name === "class" && node.hasAttribute("data-row")),
      },
    });
    localTimes(main);
    document.dispatchEvent(new Event("ganq:refreshed"));
  }

  async function send(url, values) {
    const change = document.querySelector("meta[name=ganq-change]").content;
    const answer = await fetch(url, {
      method: "POST", body: JSON.stringify(values || {}),
      headers: { "Content-Type": "application/json", "X-Ganq-Token": change },
    });
    let said = {};
    try { said = await answer.json(); } catch { /* a proxy's page */ }
    if (!answer.ok) throw new Error(said.error ? said.error.message + (said.error.hint ? " → " + said.error.hint : "") : `the server answered ${answer.status}`);
    return said;
  }

  function note(text, bad, href) {
    let place = document.getElementById("note");
    if (!place) {
      place = document.createElement("p");
      place.id = "note"; place.setAttribute("role", "status"); place.setAttribute("data-keep", "");
      main.before(place);
    }
    place.className = "notice" + (bad ? " bad" : "");
    place.textContent = text + " ";
    if (href) { const a = document.createElement("a"); a.href = href; a.textContent = "Open it"; place.append(a); }
    clearTimeout(note.timer);
    note.timer = setTimeout(() => place.remove(), bad ? 15000 : 8000);
  }

  function confirmed({ ask, yes, no }) {
    const dialog = document.getElementById("ask");
    dialog.querySelector("h2").textContent = ask;
    dialog.querySelector("[value=yes]").textContent = yes;
    dialog.querySelector("[value=no]").textContent = no;
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise(done => dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true }));
  }

  async function act(button) {
    if (button.dataset.ask && !(await confirmed(button.dataset))) return;
    button.disabled = true;
    try {
      const said = await send(button.dataset.action, button.dataset.values ? JSON.parse(button.dataset.values) : {});
      note(said.message, false, button.dataset.action.startsWith(said.url + "/") ? null : said.url);
      refresh();
    } catch (error) { note(error.message, true); }
    button.disabled = false;
  }

  async function copy(button) {
    const text = button.dataset.copy;
    try { await navigator.clipboard.writeText(text); } catch {
      const area = document.createElement("textarea");  // without https there is no clipboard
      area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
    }
    if (button.dataset.copied) return;
    const before = [...button.childNodes];
    button.style.minWidth = `${button.offsetWidth}px`;  // what stands beside it stays
    button.dataset.copied = "1"; button.textContent = "Copied";
    setTimeout(() => { button.replaceChildren(...before); delete button.dataset.copied; button.style.minWidth = ""; }, 1200);
  }

  document.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.action) act(button);
    else if (button.dataset.copy) copy(button);
    else if ("help" in button.dataset) document.getElementById("help").showModal();
  });

  function typing(event) {
    const at = event.target;
    return event.ctrlKey || event.metaKey || event.altKey || at.isContentEditable ||
      ["TEXTAREA", "SELECT"].includes(at.tagName) || (at.tagName === "INPUT" && !["range", "checkbox"].includes(at.type));
  }

  function row(step) {
    const all = [...document.querySelectorAll("[data-row]")];
    const here = all.findIndex(one => one.classList.contains("here"));
    const next = all[Math.max(0, Math.min(all.length - 1, here + step))];
    if (here >= 0) all[here].classList.remove("here");
    if (next) { next.classList.add("here"); next.scrollIntoView({ block: "nearest" }); const a = next.querySelector("a.name"); if (a) a.focus({ preventScroll: true }); }
  }

  document.addEventListener("keydown", event => {
    if (typing(event) || document.querySelector("dialog[open]")) return;
    const search = document.querySelector("[data-search]");
    if (event.key === "?") document.getElementById("help").showModal();
    else if (event.key === "g") location.href = "/";
    else if (event.key === "/" && search) search.focus();
    else if (event.key === "j") row(1);
    else if (event.key === "k") row(-1);
    else return;
    event.preventDefault();
  });

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) disconnect();
    else { heard = Date.now(); connect(); update(); }
    showLiveness();
  });
  setInterval(showLiveness, 1000);
  window.addEventListener("pagehide", disconnect);
  window.addEventListener("pageshow", connect);
  // The newest lines of a log stay in view, unless the reader has scrolled away from them.
  const newest = document.querySelector(".log") !== null && !new URLSearchParams(location.search).has("before");
  const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
  let pinned = newest;
  if (newest) {
    const toEnd = () => { if (pinned) scrollTo(0, document.documentElement.scrollHeight); };
    addEventListener("load", toEnd);
    addEventListener("scroll", () => { pinned = atEnd(); }, { passive: true });
    document.addEventListener("ganq:refreshed", toEnd);
  }

  localTimes(document);
  connect();
  return { send, note, typing, refresh };
})();
