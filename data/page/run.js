"use strict";
// The page of a run.

async function showRun() {
  const {settings, history, results} = run;
  const {epochs} = settings;
  const done = history.train_loss.length;
  const seconds = sum(history.epoch_seconds);
  const steps = run.epoch_steps * epochs;
  const part = Math.min(1, run.steps_done / steps);
  const left = Math.ceil(seconds / done * epochs * (1 - part));
  const time = left < 90 ? `${left} s` : `${Math.ceil(left / 60)} min`;
  find("title").textContent = run.title ?? settings.model;
  find("subtitle").textContent = `${run.name} · recipe ${settings.recipe}, ` +
    `${count(epochs, "epoch")}, seed ${settings.seed}, ${run.device}`;
  make(find("subtitle").parentElement, "a", {href: "../index.html"}, "All runs");
  showState("epoch", done, epochs, part, done && done < epochs ? `, ${time} left` : "");
  showHero(done);
  showResults(done, seconds);
  showCurves(steps);
  if (results.confusion_matrix) {
    showConfusion(results.confusion_matrix);
    showMistakes(results.confusion_matrix);
    showDigits(find("grid"), run.first);
  } else {
    for (const section of document.querySelectorAll(".confused, .mistaken, .tested")) {
      section.remove();
    }
  }
  const more = {"device used": run.device, machine: run.platform};
  addPairs(find("settings"), Object.entries({...settings, ...more, ...run.versions}));
  await startDrawing();
}

// ----- Results ---------------------------------------------------------------------------------

function showHero(done) {
  const {history, results} = run;
  let value = "–";
  let name = "no epoch finished yet";
  let note = "The run ended before the final test.";
  if (results.test_accuracy !== undefined) {
    value = percent(results.test_accuracy);
    name = "test accuracy";
    note = "Of 10,000 images that the network has never seen.";
  } else if (done) {
    value = percent(history.train_accuracy[done - 1]);
    name = `training accuracy, epoch ${done}`;
  }
  if (run.state === "training") note = "The final test comes after the last epoch.";
  find("hero").textContent = value;
  make(find("hero"), "small", {}, name);
  find("results-note").textContent = note;
}

function showResults(done, seconds) {
  const {history, results} = run;
  const pairs = [];
  if (results.test_accuracy !== undefined) {
    const matrix = results.confusion_matrix;
    const total = sum(matrix.flat());
    const wrong = total - sum(matrix.map((row, digit) => row[digit]));
    pairs.push(["misclassified", `${wrong.toLocaleString("en")} of ${total.toLocaleString("en")}`]);
    pairs.push(["test loss", results.test_loss.toFixed(4)]);
    pairs.push(["calibration error", percent(results.calibration_error)]);
    if (done) pairs.push(["training accuracy", percent(history.train_accuracy[done - 1])]);
  }
  if (done) {
    pairs.push(["training loss", history.train_loss[done - 1].toFixed(4)]);
    pairs.push(["training time", `${seconds.toFixed(1)} s`]);
  }
  pairs.push(["parameters", run.parameters.toLocaleString("en")]);
  addPairs(find("results"), pairs);
}

function showCurves(steps) {
  const {settings, history, state} = run;
  const curve = [{values: run.curve, every: run.curve_every}];
  const end = state === "training" ? steps : 0;
  chart("Loss per step, smoothed", "step", curve, {log: true, end});
  showEpochCurves(run);
  const text = describeCurves(history, settings, state, run.message);
  const note = make(find("charts-note").parentElement, "p", {id: "overfitting"}, text);
  find("charts-note").after(note);
}

// ----- The test --------------------------------------------------------------------------------

// matrix[label][digit]: how many test digits with this label got this prediction.
function showConfusion(matrix) {
  const wrong = matrix.flatMap((row, label) => row.filter((_, digit) => digit !== label));
  const most = Math.max(1, highest(wrong));
  const table = find("confusion");
  const head = make(table, "tr");
  make(head, "th", {scope: "col"});
  for (const digit of matrix.keys()) make(head, "th", {scope: "col"}, digit);
  make(head, "th", {scope: "col", class: "share"}, "correct");
  const cells = [];
  matrix.forEach((numbers, label) => {
    const row = make(table, "tr");
    make(row, "th", {scope: "row"}, label);
    numbers.forEach((number, digit) => {
      const share = 0.65 * number / most;
      const shade = {style: `background: rgb(230 110 30 / ${share})`};
      const look = digit === label ? {class: "right"} : shade;
      const cell = make(row, "td", look, number || "·");
      cells.push(Object.assign(cell, {label, digit, number}));
    });
    const accuracy = numbers[label] / Math.max(1, sum(numbers));
    make(row, "td", {class: "share"}, percent(accuracy, 1));
  });
  explore(cells, () => 10, showPair);
}

// Shows the digits of a cell of the confusion matrix.
function showPair(cell) {
  const {label, digit, number} = cell;
  const {labels, probabilities} = run.wrong;
  const isHere = (n) => labels[n] === label && best(probabilities[n]) === digit;
  const numbers = [...labels.keys()].filter(isHere);
  document.querySelector("#confusion .chosen")?.classList.remove("chosen");
  cell.classList.add("chosen");
  const isPart = numbers.length < number && label !== digit;
  const part = isPart ? `, the ${numbers.length} most confident of them:` : "";
  const text = `${count(number, "digit")} with true label ${label} and prediction ${digit}`;
  find("pair").replaceChildren();
  make(find("pair"), "p", {}, text + part);
  showDigits(make(find("pair"), "div", {class: "digits"}), run.wrong, numbers, true);
}

function showMistakes(matrix) {
  const total = sum(matrix.flat());
  const wrong = total - sum(matrix.map((row, digit) => row[digit]));
  const kept = run.wrong.labels.length;
  const more = find("more");
  find("wrong-note").textContent = `${wrong.toLocaleString("en")} of the ` +
    `${total.toLocaleString("en")} test digits are misclassified. The higher the probability of ` +
    "a wrong prediction, the earlier it comes here.";
  const show = (number) => {
    find("wrong").replaceChildren();
    showDigits(find("wrong"), run.wrong, run.wrong.labels.slice(0, number).keys());
    more.hidden = number >= kept;
  };
  const all = wrong.toLocaleString("en");
  more.textContent = kept < wrong ? `Show the first ${kept} of ${all}` : `Show all ${all}`;
  more.addEventListener("click", () => show(kept));
  show(40);
}
