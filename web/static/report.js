"use strict";
// Of a report that was written to a file: answers what run.js would ask a server for.
const ganq = (() => {
  const data = JSON.parse(document.getElementById("report").textContent);
  const real = window.fetch.bind(window);
  window.fetch = url => {
    if (url in data.images) return real(data.images[url]);
    const found = url === data.facts.run.curves ? data.curves : data.facts;
    return Promise.resolve(new Response(JSON.stringify(found)));
  };
  for (const one of document.querySelectorAll("time[datetime]")) one.textContent = new Date(one.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  document.addEventListener("click", event => {
    const button = event.target.closest("button[data-copy]");
    if (button) navigator.clipboard?.writeText(button.dataset.copy);
  });
  return { typing: event => ["INPUT", "SELECT"].includes(event.target.tagName) && event.target.type !== "range" };
})();
