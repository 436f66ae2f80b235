"use strict";
// While a run trains, its page reloads itself.

const tell = (text) => Object.assign(find("news"), {hidden: false, textContent: text});

// Shows how far a run is. unit: "epoch" or "run"; part: from 0 to 1.
function showState(unit, done, all, part, left = "") {
  const isTraining = run.state === "training";
  const text = describeState(unit, done, all);
  document.body.classList.add(run.state);
  document.title = (isTraining ? `${text}: ` : "") + run.name;
  find("state").textContent = text;
  find("progress").hidden = run.state === "finished";
  find("progress").setAttribute("aria-valuenow", Math.floor(100 * part));
  find("progress").firstChild.style.width = `${100 * part}%`;
  if (isTraining) find("left").textContent = `${Math.floor(100 * part)} %${left}`;
  if (run.state === "stopped") {
    tell("To continue it: python main.py --resume, and the folder of this run.");
  } else if (run.message) {
    tell(run.message);
  }
}

function describeState(unit, done, all, state = run.state) {
  if (state === "finished") return "✓ finished";
  if (state === "stopped") return `■ stopped after ${done} of ${all} ${unit}s`;
  if (state === "failed") return `✗ failed in ${unit} ${Math.min(done + 1, all)} of ${all}`;
  if (done < all) return `training, ${unit} ${done + 1} of ${all}`;
  return unit === "run" ? "finishing" : "testing";
}

// A page in use is not reloaded by itself.
function isInUse() {
  const {activeElement} = document;
  const isFocused = activeElement?.id === "paper" || activeElement?.type === "range";
  const isDrawing = drawn || place.down || place.pointer !== null || chosen !== last;
  const isZoomed = find("zoom") && !find("zoom").hidden;
  return Boolean(isFocused || isDrawing || isZoomed || String(getSelection()));
}

const getFile = () => `${run.folder}/${run.kind === "runs" ? "index" : "report"}.html`;

// Whether this is surely the file that the run writes, and not a copy of it.
function isOriginal() {
  const path = decodeURIComponent(location.pathname);
  return location.protocol === "file:" && path.endsWith(getFile().replaceAll("\\", "/"));
}

// Says why there is no news. A run has some every 5 seconds, a study after each of its runs.
function explainSilence(same) {
  if (isOriginal() || same < 3) {
    tell("No news for a long time: the run may have been ended.");
    return;
  }
  const time = new Date(1000 * run.written).toLocaleString("en-GB");
  tell(`This is a copy from ${time}, or the run has been ended: reloading it brings nothing new. ` +
    `The file itself is ${getFile()}.`);
}

// longest: the seconds between two news.
function keepUpToDate(longest = 0) {
  const before = recall();
  const isNew = before.written !== run.written;
  let same = isNew ? 0 : before.same + 1;  // reloads that brought nothing new
  // The first time we go by the clocks; later by when this page has seen something new.
  let since = before.since;
  if (isNew) since = before.written ? Date.now() : 1000 * run.written;
  remember({written: run.written, since, same});
  const isStale = () => Date.now() - since > 60_000 + 3000 * longest;
  if (isStale()) explainSilence(same);
  find("reload").addEventListener("click", reload);
  setInterval(() => {
    if (document.hidden) return;
    find("reload").hidden = !isInUse();
    if (isInUse()) return;
    same += 1;  // where a page may not reload itself, it comes here again
    if (isStale()) explainSilence(same);
    reload();
  }, isStale() ? 20_000 : 4_000);
}

function reload() {
  remember({scroll: scrollY});
  location.reload();
}

// Puts the place on the page back.
function restorePlace() {
  const {scroll} = recall();
  remember({scroll: 0});
  if (scroll) scrollTo(0, scroll);
}
