"use strict";
// Tables sort by their cells' full values; everything else on the page is there without this script.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], original = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const order = next[head.getAttribute("aria-sort") || "none"];
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (order !== "none") head.setAttribute("aria-sort", order);
      const key = (row) => {
        const cell = row.cells[column], raw = cell.dataset.value;
        return raw !== undefined && raw !== "" && isFinite(raw) ? Number(raw) : column ? null : cell.textContent;
      };
      const sign = order === "descending" ? -1 : 1;
      const compare = (a, b) => {
        const x = key(a), y = key(b);
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
      };
      body.append(...(order === "none" ? original : [...original].sort(compare)));
    });
  });
}
// Marks say their values to a pointer that hovers or taps.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
for (const mark of document.querySelectorAll("svg g.mark, svg g.dot")) {
  const title = mark.querySelector("title"), text = title.textContent;
  const show = (event) => {
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(event.clientX + 10, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(4, left) + scrollX}px`;
    tip.style.top = `${event.clientY + scrollY - tip.offsetHeight - 10}px`;
  };
  mark.addEventListener("pointerenter", show);
  mark.addEventListener("pointerleave", () => { tip.hidden = true; });
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
