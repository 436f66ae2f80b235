"use strict";
// The page of several runs: all of them, or those of a study. Its curves are in compare.js.

const IGNORED = ["device", "data_dir", "output_dir", "comet", "seeds"];
const MEASURED = [  // columns: name, value, how it is written, and which value is best
  ["test accuracy", (one) => one.test_accuracy ?? lastOf(one.test_accuracy_per_epoch), percent, -1],
  ["test loss", (one) => one.test_loss ?? lastOf(one.test_loss_per_epoch), fourDigits, 1],
  ["training accuracy", (one) => lastOf(one.train_accuracy), percent, -1],
  ["seconds", (one) => sum(one.epoch_seconds ?? []), (x) => x.toFixed(1), 1],
  ["parameters", (one) => one.parameters, (x) => x.toLocaleString("en"), 1],
];

const lastOf = (values) => values?.[values.length - 1];
function fourDigits(x) {
  return x.toFixed(4);
}

function showOverview() {
  const {runs} = run;
  document.body.classList.add("overview");
  for (const section of document.querySelectorAll(".run, #settled")) section.remove();
  for (const id of ["hero", "results", "progress"]) find(id).remove();
  const curves = document.querySelector(".curves");
  const results = document.querySelector(".reached");
  results.before(curves);
  curves.querySelector("h2").textContent = "Curves";
  const names = nameRuns(runs);
  const lines = runs.map((one, n) => ({one, name: names[n], ...lookOf(n, runs.length)}));
  showOverviewHead(runs);
  find("results-note").textContent = describeBest(lines);
  showComparison(lines);
  showOverviewTable(results, lines);
  if (runs.length === 1 && !run.is_study) suggestExperiment(results, runs[0]);
  keepOverviewUpToDate(runs);
}

function showOverviewHead(runs) {
  const training = runs.filter((one) => one.state === "training" && !isSilent(one)).length;
  const title = run.is_study ? `Study ${run.name}` : "All runs";
  find("title").textContent = title;
  document.title = training ? `${training} training: ${title}` : title;
  find("state").textContent = training ? `training: ${count(training, "run")}` : "";
  find("subtitle").textContent = count(runs.length, "run");
  if (!run.is_study) return;
  find("subtitle").textContent += " · ";
  make(find("subtitle"), "a", {href: "../index.html"}, "All runs");
}

function describeBest(lines) {
  const finished = lines.filter(({one}) => one.test_accuracy !== undefined);
  if (run.is_study) return "Mean ± standard deviation shows how much of a result is chance.";
  if (lines.length < 2 || !finished.length) return "";
  const most = highest(finished.map(({one}) => one.test_accuracy));
  const names = finished.filter(({one}) => one.test_accuracy === most).map(({name}) => name);
  return `★ Best test accuracy: ${percent(most)} (${names.slice(0, 3).join("; ")}). ` +
    "Other seeds give other results: a small difference may be chance.";
}

// ----- What differs ----------------------------------------------------------------------------

const settingOf = (one, name) => one.settings[name] ?? one.recipe_numbers?.[name];

// Returns the names of the settings that differ between the runs.
function findDifferences(runs, ignored = IGNORED) {
  const names = runs.flatMap((one) => Object.keys({...one.settings, ...one.recipe_numbers}));
  return [...new Set(names)].filter((name) => {
    // Numbers that only one recipe has do not count: the recipe's name says it.
    const values = runs.map((one) => settingOf(one, name)).filter((value) => value !== undefined);
    return !ignored.includes(name) && new Set(values).size > 1;
  });
}

// Returns a name for each run: how it differs from what most of them have.
function nameRuns(runs, ignored = IGNORED) {
  const names = findDifferences(runs, ignored);
  const usual = Object.fromEntries(names.map((name) => [name, findUsual(runs, name)]));
  const texts = runs.map((one) => {
    const own = names.filter((name) => settingOf(one, name) !== usual[name]);
    const shown = own.length ? own : names;
    const isWord = (name) => typeof settingOf(one, name) === "string";  // words come first
    const parts = [...shown.filter(isWord), ...shown.filter((name) => !isWord(name))];
    const text = parts.map((name) => writeSetting(one, name)).filter(Boolean).join(", ");
    return text || one.title || one.settings.model;
  });
  return texts.map((text, n) => {
    const isTwice = texts.filter((other) => other === text).length > 1;
    return isTwice ? `${text} (${runs[n].name})` : text;
  });
}

// Returns the value of a setting that more runs have than any other, if there is one.
function findUsual(runs, name) {
  const counts = new Map();
  for (const one of runs) {
    const value = settingOf(one, name);
    counts.set(value, (counts.get(value) ?? 0) + 1);
  }
  const [first, second] = [...counts].sort(([, a], [, b]) => b - a);
  return first[1] > second[1] ? first[0] : null;
}

function writeSetting(one, name) {
  const value = settingOf(one, name);
  if (value === undefined) return "";
  if (name === "limit" && !value) return "all images";
  return typeof value === "string" ? value : `${name.replaceAll("_", " ")} ${value}`;
}

// ----- The table -------------------------------------------------------------------------------

function showOverviewTable(section, lines) {
  section.querySelector("h2").textContent = "Results";
  const runs = lines.map(({one}) => one);
  const settings = findDifferences(runs).map((name) => {
    const title = name.replaceAll("_", " ");
    const format = (value) => (name === "limit" && !value ? "all" : String(value));
    return [title, (one) => settingOf(one, name), format, 1, findUsual(runs, name)];
  });
  const columns = [
    ["run", (one) => one.name, String, -1],
    ["state", describeRun, String, 1],
    MEASURED[0],
    ...settings,
    ...MEASURED.slice(1),
  ];
  const area = {class: "wide", tabindex: 0, role: "region", "aria-label": "Table of all runs"};
  const table = make(make(section, "div", area), "table", {id: "overview"});
  const heads = make(make(table, "thead"), "tr");
  const body = make(table, "tbody");
  for (const line of lines) line.row = showRunRow(body, line, columns, lines);
  for (const [n, column] of columns.entries()) {
    const head = make(heads, "th", {scope: "col"});
    make(head, "button", {type: "button", id: `sort-${n}`}, column[0]);
    head.addEventListener("click", () => {
      const before = recall().sort;
      const direction = before?.name === column[0] ? -before.direction : column[3];
      remember({sort: {name: column[0], direction}});
      sortOverview(lines, columns, heads);
    });
  }
  showMeans(table, lines, columns);
  sortOverview(lines, columns, heads);
}

function showRunRow(body, line, columns, lines) {
  const {one} = line;
  const row = make(body, "tr");
  const head = make(row, "th", {scope: "row"});
  addSwatch(head, line);
  const href = [...one.name.split("/"), "report.html"].map(encodeURIComponent).join("/");
  const link = make(head, "a", {href, "aria-label": one.name});
  for (const part of one.name.split(/(?=[-/])/)) {
    link.append(part);
    make(link, "wbr");
  }
  make(head, "small", {}, line.name);
  const best = highest([0, ...lines.map((other) => other.one.test_accuracy ?? 0)]);
  for (const [name, valueOf, format, , usual] of columns.slice(1)) {
    const value = valueOf(one);
    const isBest = name === "test accuracy" && one.test_accuracy === best && lines.length > 1;
    const text = (value ?? null) === null ? "–" : format(value);
    const cell = make(row, "td", {}, isBest ? `★ ${text}` : text);
    if (isBest) cell.title = "the best test accuracy";
    cell.classList.toggle("winner", isBest);
    cell.classList.toggle("usual", value === usual);
  }
  row.addEventListener("pointerenter", () => emphasise(line));
  row.addEventListener("pointerleave", () => emphasise(null));
  return row;
}

// Sorts the rows, and the key of the curves with them. Missing values come last.
function sortOverview(lines, columns, heads) {
  const {name, direction} = recall().sort ?? {};  // at first the newest run is above
  const number = columns.findIndex((column) => column[0] === name);
  const valueOf = columns[number]?.[1] ?? (() => null);
  const isMissing = (value) => (value ?? null) === null;
  const compare = ({one}, {one: other}) => {
    const [a, b] = [valueOf(one), valueOf(other)];
    if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
    if (typeof a === "number") return direction * (a - b);
    return direction * String(a).localeCompare(String(b), "en", {numeric: true});
  };
  for (const {row, label} of [...lines].sort(compare)) {
    row.parentElement.append(row);
    label.parentElement.append(label);
  }
  for (const [n, head] of [...heads.children].entries()) {
    const order = direction > 0 ? "ascending" : "descending";
    head.setAttribute("aria-sort", n === number ? order : "none");
  }
}

// ----- Means of runs that differ only by their seed ---------------------------------------------

function showMeans(table, lines, columns) {
  const finished = lines.map(({one}) => one).filter((one) => one.test_accuracy !== undefined);
  const groups = new Map();
  for (const one of finished) {
    const {seed, ...others} = one.settings;
    for (const name of IGNORED) delete others[name];
    const key = JSON.stringify([others, one.recipe_numbers, one.title, one.parameters]);
    if (!groups.has(key)) groups.set(key, new Map());
    if (!groups.get(key).has(seed)) groups.get(key).set(seed, one);
  }
  const several = [...groups.values()].filter((seeds) => seeds.size > 1);
  const firsts = several.map((seeds) => [...seeds.values()][0]);
  const names = nameRuns(firsts, [...IGNORED, "seed"]);
  const foot = several.length ? make(table, "tfoot") : null;
  several.forEach((seeds, n) => {
    const row = make(foot, "tr");
    const text = `${names[n]}: mean ± standard deviation of ${seeds.size} seeds`;
    make(row, "th", {scope: "row"}, text);
    for (const column of columns.slice(1)) {
      make(row, "td", {}, describeMean([...seeds.values()], column));
    }
  });
}

function describeMean(runs, [name, valueOf, format]) {
  const values = runs.map(valueOf).filter((value) => (value ?? null) !== null);
  if (["seed", "state"].includes(name) || !values.length) return "";
  if (new Set(values).size === 1) return format(values[0]);
  const mean = sum(values) / values.length;
  const squares = sum(values.map((value) => (value - mean) ** 2));
  const deviation = Math.sqrt(squares / (values.length - 1));
  return `${format(mean).replace(" %", "")} ± ${format(deviation)}`;
}

// ----- The state of the runs -------------------------------------------------------------------

function describeRun(one) {
  const all = one.settings.epochs;
  const done = one.train_loss?.length ?? 0;
  const state = one.state ?? (one.test_accuracy === undefined ? "stopped" : "finished");
  if (state === "training" && isSilent(one)) return `no news, after ${done} of ${all} epochs`;
  return describeState("epoch", done, all, state);
}

// Whether a run that trains has had no news for so long that it may have been ended.
function isSilent(one) {
  const seconds = Date.now() / 1000 - (one.changed ?? run.written);
  return seconds > 60 + 3 * longestEpoch(one);
}

// Returns the seconds of the longest epoch; for the first one, a time that is long enough.
const longestEpoch = ({epoch_seconds: seconds}) => highest(seconds?.length ? seconds : [300]);

// Between two runs of a study, none trains.
function keepOverviewUpToDate(runs) {
  const unfinished = runs.filter((one) => one.state === "training");
  const training = unfinished.filter((one) => !isSilent(one));
  const isNew = Date.now() / 1000 - run.written < 20;
  const {same} = recall();  // reloads that brought nothing new
  if (training.length || isNew) keepUpToDate(highest([0, ...training.map(longestEpoch)]));
  else if (unfinished.length && same !== undefined) explainSilence(same);
  addEventListener("pagehide", () => remember({focus: document.activeElement.id}));
  find(recall().focus || "title")?.focus({preventScroll: true});
}

function suggestExperiment(section, {settings}) {
  const quote = (value) => (/^[\w./:-]+$/.test(value) ? value : `"${value}"`);
  const flagOf = (name) => `--${name.replaceAll("_", "-")} ${quote(settings[name])}`;
  const names = Object.keys(settings).filter((name) => !["lr", "data_dir"].includes(name));
  const others = names.filter((name) => settings[name] !== (run.defaults ?? settings)[name]);
  const lr = settings.lr > 0.03 ? settings.lr / 10 : 10 * settings.lr;
  const flags = [...others.map(flagOf), `--lr ${Number(lr.toPrecision(3))}`];
  const text = "What to try next: change one setting, and compare. For example, another " +
    "learning rate:";
  make(section, "h3", {id: "experiment"}, "Your next experiment");
  make(section, "p", {}, text);
  make(section, "code", {id: "command"}, `python main.py ${flags.join(" ")}`);
}
