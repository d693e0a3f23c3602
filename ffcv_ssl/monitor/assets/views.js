// Current views: a row for each sample, a column for each view, with what was drawn for it.

const GAP_PX = 2; // between the views of the picture
const SIDE_PX = 112; // of a view on the page, or near it

function drawViews() {
  const shown = shownRuns().filter((run) => run.views);
  const about = shown.map(({id, info, views}) => [id, info.name, views.step, views.picture?.length,
    views.samples]);
  section("views", "Current views", JSON.stringify(about), () =>
    shown.length ? shown.map(viewsOf) : null);
}

function viewsOf(run) {
  const {views} = run;
  const facts = [["step", views.step], ["epoch", views.epoch], ["resolution", views.resolution]]
    .filter(([, value]) => value).map(([name, value]) => `${name} ${value}`).join(", ");
  const names = [...new Set(views.samples.flatMap((one) => one.views.map((view) => view.name)))];
  const grid = gridOf(views, names);
  const whole = views.picture
    ? el("img", {src: views.picture, width: views.width, height: views.height,
      alt: `Views of ${run.info.name}: a row for each sample, a column for each view`})
    : el("p", {class: "note"}, "This picture is left out: all pictures together are too large.");
  return el("figure", {class: "views", style: grid ? `--picture: url(${views.picture})` : null},
    el("figcaption", {}, el("strong", {}, run.info.name), facts ? ` · ${facts}` : ""),
    grid ? null : whole, names.length ? scrolled(drawnTable(views, names, grid), "Current views")
      : null);
}

// The size of a view in the picture and on the page; null if the picture is no such grid.
function gridOf(views, names) {
  const width = (views.width + GAP_PX) / names.length - GAP_PX;
  const height = (views.height + GAP_PX) / views.samples.length - GAP_PX;
  if (!views.picture || !Number.isInteger(width) || !Number.isInteger(height)) return null;
  const scale = SIDE_PX / Math.max(width, height);
  return {width, height, scale: scale > 1 ? Math.floor(scale) : scale};
}

function drawnTable(views, names, grid) {
  const cell = (sample, row, name, column) => el("td", {}, el("div", {class: "view-cell"},
    grid ? viewPicture(views, grid, row, column, `sample ${sample.index}, ${name}`) : null,
    el("div", {}, drawnBy(sample, name).map(([op, values]) =>
      el("div", {}, el("strong", {}, op), ` ${values}`)))));
  return el("table", {class: "drawn"}, el("thead", {}, el("tr", {},
    ["sample", ...names].map((name) => el("th", {scope: "col"}, name)))),
    el("tbody", {}, views.samples.map((sample, row) => el("tr", {},
      el("th", {scope: "row"}, sample.index),
      names.map((name, column) => cell(sample, row, name, column))))));
}

function drawnBy(sample, name) {
  return sample.views.find((view) => view.name === name)?.drawn ?? [];
}

function viewPicture(views, {width, height, scale}, row, column, label) {
  const px = (number) => `${number * scale}px`;
  const left = column * (width + GAP_PX), top = row * (height + GAP_PX);
  return el("div", {class: `view${scale > 1 ? " enlarged" : ""}`, role: "img", "aria-label": label,
    style: `width:${px(width)};height:${px(height)};background-position:${px(-left)} ${px(-top)};`
      + `background-size:${px(views.width)} ${px(views.height)}`});
}
