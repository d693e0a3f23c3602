// What is not a curve: headline numbers, final numbers, evaluations, settings.

const MAX_CARDS = 4;

function swatch(run) {
  return el("span", {class: "swatch", style: `background:${color(slotOf(run))}`});
}

function badge(state) {
  return el("span", {class: `badge ${state.replace(/ /g, "-")}`}, state);
}

function drawHeadlines() {
  const shown = shownRuns(), parent = byId("headlines");
  parent.hidden = shown.length > MAX_CARDS || !shown.length;
  const signature = JSON.stringify([darkScheme.matches, shown.map((run) => [run.info, slotOf(run)])]);
  redraw(parent, signature, () => parent.hidden ? [] : shown.map((run) => card(run, shown.length)));
}

function card(run, number) {
  const {info} = run, of = info.epochs ? ` of ${short(info.epochs)}` : "";
  const accuracy = info.accuracy.key === "val/map" ? "mAP" : "top-1";
  const name = info.accuracy.key.includes("backbone") ? `backbone ${accuracy}` : accuracy;
  const left = isNumber(info.seconds_left) ? `about ${duration(info.seconds_left)} left` : "";
  const best = ({best, epoch}) => isNumber(best) ? `best ${percent(best)}, epoch ${short(epoch)}` : "";
  const numbers = [
    [name, percent(info.accuracy.last), best(info.accuracy)],
    ["k-NN top-1", percent(info.knn.last), best(info.knn)],
    ["loss", short(info.loss), ""],
    ["images/s", short(info.images_per_s), ""],
    ["epoch", short(info.epoch), of],
    ["time", duration(info.seconds), left],
  ];
  return el("article", {class: "card", "data-run": info.name},
    el("h2", {}, number > 1 ? swatch(run) : null, el("span", {class: "name"}, info.name),
      badge(info.state)),
    el("dl", {}, numbers.map(([term, value, more]) => el("div", {},
      el("dt", {}, term), el("dd", {}, el("strong", {}, value), el("small", {}, more))))),
    info.notes.map((note) => el("p", {class: "note"}, note)));
}

function section(id, title, signature, make) {
  const node = byId(id);
  redraw(node, signature, () => {
    const content = make();
    node.hidden = !content;
    return content ? [el("h2", {id: `${id}-title`}, title), content] : [];
  });
}

function scrolled(table, label) {
  return el("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": label}, table);
}

function headRow(first, shown) {
  return el("thead", {}, el("tr", {}, el("th", {scope: "col"}, first),
    shown.map((run) => el("th", {scope: "col", class: "run-name"},
      shown.length > 1 ? swatch(run) : null, run.info.name))));
}

// ---- Final numbers

function drawFinals() {
  const shown = shownRuns().filter((run) => Object.keys(run.finals).length);
  const signature = JSON.stringify(
    [darkScheme.matches, shown.map((run) => [run.info.name, slotOf(run), run.finals])]);
  section("finals", "Last numbers", signature, () => shown.length ? finalsTable(shown) : null);
}

function finalsTable(shown) {
  const keys = [...new Set(shown.flatMap((run) => Object.keys(run.finals)))];
  const groups = [
    ["evaluation", keys.filter((key) => /^(val|health)\//.test(key))],
    ["training", keys.filter((key) => /^train\/|^lr$|^resolution$/.test(key))],
  ];
  const rest = keys.filter((key) => !groups.some(([, members]) => members.includes(key)));
  const tables = [...groups, ["counters and others", rest]].filter(([, members]) => members.length);
  return el("div", {class: "finals"}, tables.map(([title, members]) =>
    scrolled(finalsOf(title, members, shown), `Last numbers: ${title}`)));
}

function finalsOf(title, keys, shown) {
  const cell = (run, key) => {
    const final = run.finals[key];
    const best = isNumber(final?.best) && final.best !== final.last
      ? `best ${percent(final.best)} at epoch ${short(final.epoch)}` : "";
    return el("td", {title: isNumber(final?.last) ? String(final.last) : null},
      final ? amount(key, final.last) : "", best ? el("small", {}, best) : null);
  };
  return el("table", {class: "numbers"}, headRow(title, shown),
    el("tbody", {}, keys.map((key) => el("tr", {}, el("th", {scope: "row"}, key),
      shown.map((run) => cell(run, key))))));
}

// ---- Evaluations of evaluate.py

function drawEvaluations() {
  const shown = shownRuns().filter((run) => run.evaluations?.length);
  const signature = JSON.stringify(shown.map((run) => [run.info.name, run.evaluations]));
  section("evaluations", "Evaluations", signature, () => shown.length ? evaluationsTable(shown) : null);
}

function evaluationsTable(shown) {
  const row = (run, one) => el("tr", {}, el("th", {scope: "row"}, run.info.name),
    el("td", {}, one.protocol),
    el("td", {}, Object.entries(one.metrics).map(([key, value]) =>
      el("div", {class: "metric"}, el("span", {}, key), el("strong", {}, percent(value))))),
    el("td", {}, one.time.replace("T", " ").replace("+00:00", " UTC")),
    el("td", {}, el("details", {}, el("summary", {}, "settings"), settingsTable(one.settings))));
  const heads = ["run", "protocol", "result", "measured", ""];
  return scrolled(el("table", {}, el("thead", {}, el("tr", {},
    heads.map((head) => el("th", {scope: "col"}, head)))),
    el("tbody", {}, shown.flatMap((run) => run.evaluations.map((one) => row(run, one))))),
    "Evaluations");
}

function settingsTable(settings) {
  return el("table", {class: "settings"}, el("tbody", {}, Object.entries(settings).map(
    ([key, value]) => el("tr", {}, el("th", {scope: "row"}, key), el("td", {}, value)))));
}

// ---- Settings: where runs differ; all of them where there is one run

function drawConfig() {
  const shown = shownRuns().filter((run) => run.config);
  const signature = JSON.stringify(
    [darkScheme.matches, shown.map((run) => [run.info.name, slotOf(run), run.config])]);
  const title = shown.length > 1 ? "Differences of settings" : "Settings";
  section("config", title, signature, () => {
    if (!shown.length) return null;
    if (shown.length > 1) return differences(shown);
    return el("details", {}, el("summary", {}, "all settings of this run"),
      scrolled(settingsTable(shown[0].config), "Settings"));
  });
}

function differences(shown) {
  const keys = [...new Set(shown.flatMap((run) => Object.keys(run.config)))].sort();
  const isOfAll = (key) => shown.every((run) => key in run.config);
  const differing = keys.filter((key) => key !== "out" && isOfAll(key) &&
    new Set(shown.map((run) => run.config[key])).size > 1);
  const ofSome = keys.filter((key) => !isOfAll(key)); // of pretraining or of fine-tuning alone
  return [
    differing.length ? settingsOf(differing, shown)
      : el("p", {class: "empty"}, "Settings that these runs share are equal."),
    ofSome.length ? el("details", {}, el("summary", {},
      `${ofSome.length} settings that only some of these runs have`), settingsOf(ofSome, shown))
      : null,
  ];
}

function settingsOf(keys, shown) {
  return scrolled(el("table", {class: "settings"}, headRow("setting", shown),
    el("tbody", {}, keys.map((key) => el("tr", {}, el("th", {scope: "row"}, key),
      shown.map((run) => el("td", {}, run.config[key] ?? "not set")))))), "Differences of settings");
}
