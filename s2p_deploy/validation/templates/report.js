"use strict";
// Without this script the page shows the same: pairs worst first, tables in module order, three scales picked out.
// Nothing from outside is in here: the content policy allows this very text and no other, and reads attributes as text.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Pairs: worst, best or prompts' order.
  const pairs = document.querySelector(".pairs");
  const orders = { worst: (a, b) => a.psnr - b.psnr, best: (a, b) => b.psnr - a.psnr, prompt: (a, b) => a.index - b.index };
  const buttons = all("[data-order]");
  const order = (name) => {
    const cards = all(".pair", pairs).map((card) => ({ card, psnr: Number(card.dataset.psnr), index: Number(card.dataset.index) }));
    cards.sort((a, b) => orders[name](a, b) || a.index - b.index);
    pairs.append(...cards.map((found) => found.card));
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.order === name));
  };
  for (const button of buttons) button.addEventListener("click", () => order(button.dataset.order));
  const whole = document.querySelector("#all-pairs");
  if (whole) pairs.classList.add("few");
  whole?.addEventListener("click", () => whole.setAttribute("aria-pressed", String(!pairs.classList.toggle("few"))));

  // Tables: a click on a heading sorts by its column, another turns the order round. Empty cells stay last.
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  };
  const sort = (table, header) => {
    const column = header.cellIndex;
    const direction = header.getAttribute("aria-sort") === "descending" ? "ascending" : header.hasAttribute("aria-sort") ? "descending" : header.dataset.first || "ascending";
    const sign = direction === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].map((row, place) => ({ row, place, value: value(row, column) }));
    rows.sort((a, b) => (a.value === "") - (b.value === "") || sign * compare(a.value, b.value) || a.place - b.place);
    table.tBodies[0].append(...rows.map((found) => found.row));
    for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
  };
  for (const table of all("table.sortable")) {
    for (const header of all("thead th", table)) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sort(table, header));
    }
  }

  // Scales: one activation quantizer's line stands out, chosen by name or by a click on the heat map.
  const chooser = document.querySelector("#act-quantizer");
  const heat = document.querySelector("#scale-heat");
  const choose = (column) => {
    const option = chooser.querySelector(`option[value="${column}"]`);
    for (const line of all(".lines .chosen")) line.classList.remove("chosen");
    chooser.value = option ? String(column) : "";
    document.querySelector(".lines").classList.toggle("one", Boolean(option));
    document.querySelector("#scale-note").textContent = option?.dataset.note ?? "";
    const line = option && document.querySelector(`#scale-line-${column}`);
    if (!line) return;
    line.classList.add("chosen");
    line.parentNode.append(line);
  };
  if (chooser) {
    chooser.addEventListener("change", () => choose(chooser.value === "" ? -1 : Number(chooser.value)));
    heat?.classList.add("choosable");
    heat?.addEventListener("click", (event) => {
      const box = heat.getBoundingClientRect();
      const count = chooser.options.length - 1;
      choose(Math.min(count - 1, Math.floor(((event.clientY - box.top) / box.height) * count)));
    });
  }

  for (const control of all(".scripted")) control.hidden = false;
})();
