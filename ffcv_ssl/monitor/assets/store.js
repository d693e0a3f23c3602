// What the page knows of the runs, put together from the updates of `Board.since`.

const store = {boot: "", version: 0, order: [], panels: [], isCut: false, runs: new Map()};

// Take an update in; false if it does not fit what is known, so that all must be fetched again.
function takeIn(update) {
  if (update.from !== 0 && (update.boot !== store.boot || update.from !== store.version))
    return false;
  if (update.from === 0) store.runs.clear();
  const fits = update.runs.every(mergeRun);
  store.boot = update.boot;
  store.version = fits ? update.version : 0;
  if (!update.order) return fits;
  Object.assign(store, {order: update.order, panels: update.panels, isCut: update.is_cut});
  for (const id of [...store.runs.keys()]) if (!store.order.includes(id)) store.runs.delete(id);
  return fits;
}

function mergeRun(parts) {
  const run = store.runs.get(parts.id) ?? {id: parts.id, tables: {}, changes: 0};
  const {tables, ...others} = parts;
  Object.assign(run, others);
  run.changes += 1;
  store.runs.set(parts.id, run);
  return Object.entries(tables).every(([kind, rows]) => mergeRows(run.tables, kind, rows));
}

function mergeRows(tables, kind, rows) {
  if (rows.from === 0) {
    tables[kind] = rows;
    return true;
  }
  const known = tables[kind];
  if (!known || known.axes.step.length !== rows.from) return false;
  append(known.axes, rows.axes, rows.from);
  append(known.columns, rows.columns, rows.from);
  Object.assign(known, {records: rows.records, stride: rows.stride});
  return true;
}

function append(columns, more, length) {
  for (const [key, values] of Object.entries(more)) {
    columns[key] ??= new Array(length).fill(null); // a key that came later
    for (const value of values) columns[key].push(value);
  }
}

function runs() {
  return store.order.map((id) => store.runs.get(id)).filter((run) => run?.info);
}

// The x axes that a run has numbers of.
function knownAxes() {
  return Object.keys(AXES).filter((axis) => runs().some((run) =>
    Object.values(run.tables).some((table) => table.axes[axis].some(isNumber))));
}

// The points of a key: {x, y}, null where there is a gap; null if the run has none.
function pointsOf(run, key, axis) {
  const parts = Object.values(run.tables).filter(
    (table) => table.columns[key]?.some(isNumber) && table.axes[axis].some(isNumber),
  );
  if (!parts.length) return null;
  if (parts.length === 1) return {x: parts[0].axes[axis], y: parts[0].columns[key]};
  const points = parts.flatMap((table) =>
    table.columns[key].map((y, row) => [table.axes[axis][row], y]).filter(([, y]) => isNumber(y)),
  );
  points.sort((a, b) => a[0] - b[0]);
  return {x: points.map(([x]) => x), y: points.map(([, y]) => y)};
}

// ---- What people have chosen: runs by id, keys by panel, the x axis

const MAX_SHOWN_AT_FIRST = 8, FEW_RUNS = 3;
const AXES = {
  epoch: "epoch", step: "step", images: "images", flops: "FLOPs", seconds: "seconds",
};
const chosen = {axis: "epoch", runs: new Map(), keys: new Map(), logs: new Set()};

function newestFirst(list) {
  return [...list].sort((a, b) => (b.info.changed ?? 0) - (a.info.changed ?? 0));
}

// Runs that came since are shown while few are.
function chooseNewRuns() {
  const list = runs(), isFirst = chosen.runs.size === 0;
  const order = list.length > MAX_SHOWN_AT_FIRST ? newestFirst(list) : list;
  let shown = list.filter((run) => chosen.runs.get(run.id)).length;
  for (const run of order) {
    if (chosen.runs.has(run.id)) continue;
    const isShown = shown < MAX_SHOWN_AT_FIRST && (isFirst || list.length <= MAX_SHOWN_AT_FIRST);
    chosen.runs.set(run.id, isShown);
    shown += isShown;
  }
}

function shownRuns() {
  return runs().filter((run) => chosen.runs.get(run.id));
}

function isKeyShown(panel, index) {
  const {key} = panel.keys[index];
  return chosen.keys.get(`${panel.id} ${key}`) ?? (index === 0 || shownRuns().length <= FEW_RUNS);
}

function setKeyShown(panel, key, isShown) {
  chosen.keys.set(`${panel.id} ${key}`, isShown);
}

// Each shown run keeps its color while it is shown.
const slots = new Map();
function slotOf(run) {
  const shown = new Set(shownRuns().map(({id}) => id));
  for (const id of slots.keys()) if (!shown.has(id)) slots.delete(id);
  if (!slots.has(run.id)) {
    const taken = new Set(slots.values());
    let slot = 0;
    while (taken.has(slot)) slot += 1;
    slots.set(run.id, slot);
  }
  return slots.get(run.id);
}
