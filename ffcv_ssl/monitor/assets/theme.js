// Colors: of the browser's scheme, each at least 3:1 against the panels.

const LIGHT = [
  "#0b62a4", "#c2410c", "#15803d", "#7c3aed", "#b91c6b",
  "#0e7490", "#8a5a00", "#475569", "#be123c", "#4d7c0f",
];
const DARK = [
  "#5aa9f0", "#f59e5b", "#4cc38a", "#b79cf5", "#f07ab8",
  "#3fc3d6", "#e0b84a", "#a9b4c2", "#f2788a", "#a3c65c",
];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const DASH_ARRAYS = {
  solid: null, dash: "6 3", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 3",
  longdashdot: "10 3 2 3",
};

const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 600px)");

function color(slot) {
  const palette = darkScheme.matches ? DARK : LIGHT;
  return palette[slot % palette.length];
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A piece of a line, as a legend.
function sample(lineColor, dash) {
  const line = el("line", {x1: 1, y1: 5, x2: 25, y2: 5, stroke: lineColor, "stroke-width": 3,
    "stroke-dasharray": DASH_ARRAYS[dash]});
  return el("svg", {width: 26, height: 10, "aria-hidden": "true", class: "sample"}, line);
}
