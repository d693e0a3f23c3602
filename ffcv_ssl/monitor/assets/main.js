// Draws everything, and in a live page asks the server for what is new.

const about = JSON.parse(byId("board").textContent);

function draw() {
  chooseNewRuns();
  const axes = knownAxes();
  if (axes.length && !axes.includes(chosen.axis)) chosen.axis = axes[0];
  drawToolbar();
  drawHeadlines();
  drawRuns();
  drawPanels();
  drawViews();
  drawFinals();
  drawEvaluations();
  drawConfig();
  const names = runs().map((run) => run.info.name);
  document.title = `${names.slice(0, 3).join(", ") || "no runs"} – ffcv-ssl monitor`;
}

// The x axis, and which color is which run: stays in sight while the page scrolls.
function drawToolbar() {
  const shown = shownRuns(), several = shown.length > 1;
  const axes = knownAxes();
  const signature = JSON.stringify([darkScheme.matches, axes, chosen.axis,
    several ? shown.map((run) => [run.info.name, slotOf(run)]) : []]);
  redraw(byId("toolbar"), signature, () => [
    axes.length ? el("fieldset", {}, el("legend", {}, "x axis"), axes.map(axisChoice)) : null,
    several ? el("ul", {class: "legend", "aria-label": "Colors of runs"}, legendOf(shown)) : null,
  ]);
}

const MAX_IN_LEGEND = 12;
function legendOf(shown) {
  const rest = shown.length - MAX_IN_LEGEND;
  return [
    ...shown.slice(0, MAX_IN_LEGEND).map((run) => el("li", {title: run.info.name}, swatch(run),
      el("span", {class: "name"}, run.info.name))),
    rest > 0 ? el("li", {}, `and ${rest} more`) : null,
  ];
}

function axisChoice(axis) {
  const input = el("input", {type: "radio", name: "axis", value: axis,
    checked: axis === chosen.axis, onchange() {
      chosen.axis = axis;
      draw();
      document.querySelector(`input[name=axis][value=${axis}]`)?.focus();
    }});
  return el("label", {}, input, el("span", {}, AXES[axis]));
}

// ---- Live

const RETRY_FACTOR = 3;
let failures = 0;

async function poll() {
  try {
    const answer = await fetch(`data?boot=${store.boot}&version=${store.version}`,
      {cache: "no-store"});
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const update = await answer.json();
    failures = 0;
    const isNew = update.version !== store.version || update.boot !== store.boot;
    const fits = takeIn(update);
    if (isNew && fits) draw();
    say(`live · last news at ${clock(isNew)}`);
    pollAgain(fits ? about.poll_s : 0);
  } catch (error) {
    failures += 1;
    say(`no answer from the monitor (${error.message}); what is shown may be old`, "lost");
    pollAgain(about.poll_s * (failures > 2 ? RETRY_FACTOR : 1));
  }
}

// A page that nobody sees asks nothing: the run may need the processor.
function pollAgain(seconds) {
  setTimeout(() => {
    if (document.hidden) document.addEventListener("visibilitychange", poll, {once: true});
    else poll();
  }, 1000 * seconds);
}

let newsAt = null;
function clock(isNew) {
  if (isNew || !newsAt) newsAt = new Date();
  return newsAt.toLocaleTimeString("en-GB");
}

function say(text, className = "") {
  const node = byId("status");
  if (node.textContent !== text) node.textContent = text;
  node.className = className;
}

// ---- Begin

for (const media of [darkScheme, narrow]) media.addEventListener("change", draw);
if (about.update) {
  takeIn(about.update);
  say(`written ${about.written}`);
  draw();
} else {
  say("reading the runs");
  poll();
}
