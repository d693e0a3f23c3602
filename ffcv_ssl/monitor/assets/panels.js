// The curves: a panel for each group of keys that a shown run has, with its own legend.

const MAX_POINTS_WITH_MARKERS = 60;
const PLOT_HEIGHT_PX = 270;

function drawPanels() {
  const shown = shownRuns(), parent = byId("panels");
  const panels = store.panels.filter((panel) =>
    panel.keys.some(({key}) => shown.some((run) => pointsOf(run, key, chosen.axis))),
  );
  const ids = panels.map((panel) => panel.id);
  redraw(parent, JSON.stringify(ids), () => panels.map(makePanel));
  if (!panels.length) {
    const why = runs().length ? (shown.length ? "No records yet." : "No run is chosen.") : "No run yet.";
    redraw(parent, why, () => el("p", {class: "empty"}, why));
  }
  const nodes = [...parent.querySelectorAll(".panel")];
  nodes.forEach((node, index) => fillPanel(node, panels[index], shown));
}

function makePanel(panel) {
  const id = `title-${panel.id.replace(/\W/g, "-")}`;
  return el("section", {class: "panel", "aria-labelledby": id, "data-panel": panel.id},
    el("div", {class: "panel-head"}, el("h2", {id}, panel.title),
      panel.about ? el("p", {class: "about"}, panel.about) : null),
    el("div", {class: "chips", role: "group", "aria-label": `Curves of ${panel.title}`}),
    el("div", {class: "plot", role: "img"}),
    el("p", {class: "note", hidden: true}));
}

function fillPanel(node, panel, shown) {
  const signature = JSON.stringify([
    darkScheme.matches, narrow.matches, chosen.axis, chosen.logs.has(panel.id), panel,
    panel.keys.map((_, index) => isKeyShown(panel, index)),
    shown.map((run) => [run.id, run.info.name, slotOf(run), sizes(run)]),
  ]);
  if (drawn.get(node) === signature) return;
  drawn.set(node, signature);
  fillChips(node.querySelector(".chips"), panel, shown);
  const plot = node.querySelector(".plot");
  const traces = tracesOf(panel, shown);
  plot.setAttribute("aria-label", describe(panel, traces));
  Plotly.react(plot, traces, layoutOf(panel), CONFIG);
  fillNote(node.querySelector(".note"), panel, shown);
}

function sizes(run) {
  return Object.values(run.tables).map((table) => [table.records, table.axes.step.length,
    run.changes]);
}

// ---- Legends

function fillChips(parent, panel, shown) {
  const several = shown.length > 1, keys = panel.keys.filter(({label}) => label);
  const states = keys.map((_, index) => isKeyShown(panel, index));
  const isLog = chosen.logs.has(panel.id);
  const signature = JSON.stringify([keys, states, isLog, several, darkScheme.matches]);
  redraw(parent, signature, () => [
    ...keys.map(({key, label}, index) => chip(label, states[index], {"data-key": key}, () =>
      setKeyShown(panel, key, !states[index]), keySample(index, several))),
    panel.log ? chip("log scale", isLog, {class: "chip option"}, () =>
      chosen.logs[isLog ? "delete" : "add"](panel.id)) : null,
  ]);
}

function chip(label, isOn, attributes, toggle, ...before) {
  return el("button", {type: "button", class: "chip", "aria-pressed": String(isOn), ...attributes,
    onclick(event) {
      const parent = event.currentTarget.parentNode;
      const place = [...parent.children].indexOf(event.currentTarget);
      toggle();
      draw();
      parent.children[place]?.focus();
    }}, ...before, el("span", {}, label));
}

function keySample(index, several) {
  return several ? sample("currentColor", DASHES[index % DASHES.length])
    : sample(color(index), DASHES[Math.floor(index / LIGHT.length) % DASHES.length]);
}

// ---- Curves

function tracesOf(panel, shown) {
  const several = shown.length > 1;
  return shown.flatMap((run) => panel.keys.map(({key, label}, index) => {
    const points = pointsOf(run, key, chosen.axis);
    if (!points) return null;
    const lineColor = several ? color(slotOf(run)) : color(index);
    const dashes = several ? index : Math.floor(index / LIGHT.length);
    const names = several ? [run.info.name, label] : [label];
    return {
      ...points, ...marks(points.y, several ? 4 : 6), type: "scatter", connectgaps: false,
      name: plain(names.filter(Boolean).join(" · ") || panel.title), meta: {run: run.info.name, key},
      visible: isKeyShown(panel, index),
      line: {color: lineColor, width: 2, dash: DASHES[dashes % DASHES.length],
        shape: panel.step ? "hv" : "linear"},
      hovertemplate: `%{y:${panel.unit === "%" ? ".2%" : ",.5~g"}}<extra>%{fullData.name}</extra>`,
    };
  })).filter(Boolean);
}

// Few points get markers; of many, those that stand alone between gaps, which no line would show.
function marks(values, size) {
  const number = values.filter(isNumber).length;
  if (number <= MAX_POINTS_WITH_MARKERS)
    return {mode: "lines+markers", marker: {size: number < 4 ? size + 3 : size}};
  const isAlone = (row) => !isNumber(values[row - 1]) && !isNumber(values[row + 1]);
  if (!values.some((value, row) => isNumber(value) && isAlone(row))) return {mode: "lines"};
  const sizes = values.map((value, row) => (isNumber(value) && isAlone(row) ? size : 0));
  return {mode: "lines+markers", marker: {size: sizes}};
}

// Nothing leaves this page: newer versions of plotly.js would offer to upload a chart.
const CONFIG = {
  displaylogo: false, responsive: true, typesetMath: false, showSendToCloud: false,
  plotlyServerURL: "", modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
};

function layoutOf(panel) {
  const grid = cssColor("--grid"), ink = cssColor("--muted");
  const isPercent = panel.unit === "%", isTouch = window.matchMedia("(pointer: coarse)").matches;
  const axis = {gridcolor: grid, linecolor: grid, zeroline: false, automargin: true,
    tickfont: {color: ink, size: 11}};
  return {
    height: PLOT_HEIGHT_PX, margin: {l: 48, r: 14, t: 26, b: 40}, autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: {color: ink, family: "system-ui, sans-serif"}, uirevision: chosen.axis,
    hovermode: shownRuns().length > FEW_RUNS ? "closest" : "x unified",
    hoverlabel: {bgcolor: cssColor("--card"), bordercolor: grid, font: {color: cssColor("--ink")},
      namelength: 40},
    dragmode: isTouch ? false : "zoom",
    modebar: {bgcolor: "rgba(0,0,0,0)", color: ink, activecolor: cssColor("--accent")},
    xaxis: {...axis, title: {text: AXES[chosen.axis], font: {size: 12}, standoff: 6},
      nticks: narrow.matches ? 6 : 9, exponentformat: chosen.axis === "flops" ? "e" : "SI"},
    yaxis: {...axis, type: chosen.logs.has(panel.id) ? "log" : "linear",
      title: {text: isPercent ? "" : panel.unit, font: {size: 12}},
      tickformat: isPercent ? ".3~%" : "", exponentformat: "SI", nticks: 6,
      uirevision: `${chosen.axis} ${chosen.logs.has(panel.id)}`},
  };
}

// ---- In words

function describe(panel, traces) {
  const lines = traces.filter((trace) => trace.visible).slice(0, 12).map((trace) => {
    const last = trace.y.findLast(isNumber);
    return `${trace.meta.run} ${trace.meta.key} ${amount(trace.meta.key, last)}`;
  });
  return `${panel.title} over ${AXES[chosen.axis]}. Last values: ${lines.join("; ")}`;
}

function fillNote(node, panel, shown) {
  const strides = shown.flatMap((run) => Object.values(run.tables)
    .filter((table) => table.stride > 1 && panel.keys.some(({key}) => table.columns[key]))
    .map((table) => table.stride));
  node.hidden = !strides.length;
  node.textContent = strides.length
    ? `Thinned: the lowest and the highest value of up to ${short(Math.max(...strides))} records each.`
    : "";
}
