// The table of runs: which are drawn, sorted by any column, searched by name, method and state.

const COLUMNS = [
  {name: "run", value: ({info}) => info.name, isText: true},
  {name: "state", value: ({info}) => info.state, isText: true},
  {name: "method", value: ({info}) => info.method, isText: true},
  {name: "epoch", value: ({info}) => info.epoch, show: short},
  {name: "best top-1", value: ({info}) => info.accuracy.best, show: percent},
  {name: "last top-1", value: ({info}) => info.accuracy.last, show: percent},
  {name: "k-NN", value: ({info}) => info.knn.last, show: percent},
  {name: "loss", value: ({info}) => info.loss, show: short},
  {name: "images/s", value: ({info}) => info.images_per_s, show: short},
  {name: "time", value: ({info}) => info.seconds, show: duration},
  {name: "changed", value: ({info}) => info.changed, show: since},
];
const FEW_TO_SEARCH = 5;
const sorting = {column: null, isDown: false};
const rowNodes = new Map();

function drawRuns() {
  const list = runs(), parent = byId("runs");
  parent.hidden = list.length < 2;
  if (parent.hidden) return;
  redraw(parent, "table", makeRuns);
  byId("search-box").hidden = list.length <= FEW_TO_SEARCH;
  const query = byId("search").value.toLowerCase();
  const found = sorted(list).filter((run) => matches(run, query));
  for (const id of [...rowNodes.keys()]) if (!store.runs.has(id)) rowNodes.delete(id);
  const rows = found.map(rowOf), body = parent.querySelector("tbody");
  if (rows.some((row, place) => body.children[place] !== row) || body.children.length !== rows.length)
    keepFocus(() => body.replaceChildren(...rows));
  parent.querySelectorAll("th[data-column]").forEach((head) => {
    const isSorted = head.dataset.column === sorting.column;
    head.setAttribute("aria-sort", !isSorted ? "none" : sorting.isDown ? "descending" : "ascending");
  });
  const count = shownRuns().length;
  const cut = store.isCut ? "; more runs are left out" : "";
  byId("runs-count").textContent = `${count} of ${list.length} runs drawn${cut}`;
}

function keepFocus(change) {
  const focused = document.activeElement;
  change();
  if (focused !== document.activeElement && focused?.isConnected) focused.focus();
}

function matches({info}, query) {
  const text = `${info.name} ${info.method} ${info.state}`.toLowerCase();
  return query.split(/\s+/).every((word) => text.includes(word));
}

function sorted(list) {
  const column = COLUMNS.find(({name}) => name === sorting.column);
  if (!column) return list.length > MAX_SHOWN_AT_FIRST ? newestFirst(list) : list;
  const sign = sorting.isDown ? -1 : 1;
  const isMissing = (value) => value === null || value === undefined || value === "";
  return [...list].sort((a, b) => {
    const [first, second] = [column.value(a), column.value(b)];
    if (isMissing(first) || isMissing(second)) return isMissing(first) - isMissing(second);
    if (!column.isText) return sign * (first - second);
    return sign * String(first).localeCompare(String(second), "en", {numeric: true});
  });
}

function makeRuns() {
  const search = el("input", {id: "search", type: "search", placeholder: "name, method or state",
    oninput: drawRuns});
  const head = el("tr", {}, el("th", {scope: "col"}, el("span", {class: "hidden-text"}, "drawn")),
    COLUMNS.map(({name, isText}) => el("th", {scope: "col", "data-column": name,
      "aria-sort": "none", class: isText ? null : "number"},
      el("button", {type: "button", onclick: () => sortBy(name, !isText)}, name))));
  return [
    el("div", {class: "runs-head"}, el("h2", {id: "runs-title"}, "Runs"),
      el("label", {id: "search-box"}, "Search ", search),
      el("button", {type: "button", onclick: () => chooseFound(true)}, "draw all found"),
      el("button", {type: "button", onclick: () => chooseFound(false)}, "draw none"),
      el("span", {id: "runs-count"})),
    scrolled(el("table", {class: "runs"}, el("thead", {}, head), el("tbody")), "Runs"),
  ];
}

function sortBy(name, isDownFirst) {
  const again = sorting.column === name;
  Object.assign(sorting, {column: name, isDown: again ? !sorting.isDown : isDownFirst});
  drawRuns();
}

function chooseFound(isShown) {
  const query = byId("search").value.toLowerCase();
  for (const run of runs())
    if (!isShown || matches(run, query)) chosen.runs.set(run.id, isShown);
  draw();
}

function rowOf(run) {
  if (!rowNodes.has(run.id)) rowNodes.set(run.id, makeRow(run));
  const row = rowNodes.get(run.id), isShown = chosen.runs.get(run.id);
  const box = row.querySelector("input"), mark = row.querySelector(".swatch");
  box.checked = isShown;
  box.setAttribute("aria-label", `draw ${run.info.name}`);
  mark.style.background = isShown ? color(slotOf(run)) : "transparent";
  COLUMNS.forEach(({value, show}, place) => {
    const cell = row.children[place + 1], found = value(run);
    const text = show ? show(found) : found ?? "";
    const node = cell.querySelector(".text") ?? cell;
    if (node.textContent !== text) node.textContent = text;
  });
  row.children[1].title = run.info.path;
  row.children[2].className = `state ${run.info.state.replace(/ /g, "-")}`;
  return row;
}

function makeRow(run) {
  const box = el("input", {type: "checkbox", onchange(event) {
    chosen.runs.set(run.id, event.target.checked);
    draw();
  }});
  const cells = COLUMNS.map(({name, isText}) => name === "run"
    ? el("th", {scope: "row"}, el("span", {class: "swatch"}), el("span", {class: "text"}))
    : el("td", {class: isText ? null : "number"}));
  return el("tr", {}, el("td", {}, box), cells);
}
