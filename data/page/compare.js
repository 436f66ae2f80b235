"use strict";
// The curves of several runs in one picture each, and their key.

const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const HUES = 6;  // colours in runs.css
const DISTINCT = 12;  // so many lines look different from each other; older ones are grey

// Returns the look of the run in place n of so many, the newest first. It stays the same when
// newer runs come.
function lookOf(n, all) {
  const age = all - 1 - n;
  if (n >= DISTINCT) return {colour: "var(--older)", dash: ""};
  return {colour: `var(--line-${age % HUES})`, dash: DASHES[age % DASHES.length]};
}

function addSwatch(parent, {colour, dash}) {
  const svg = make(parent, "svg", {viewBox: "0 0 28 10", class: "swatch", "aria-hidden": true});
  const look = {stroke: colour, "stroke-dasharray": dash, class: "curve"};
  make(svg, "line", {x1: 0, x2: 28, y1: 5, y2: 5, ...look});
}

// Draws the curves and the key: a checkbox for each line.
function showComparison(lines) {
  const note = find("charts-note");
  note.textContent = "Each line is one run, named by what differs. ";
  make(note, "span", {class: "screen"}, "Point at a name to find its line.");
  note.hidden = lines.length === 1;
  const key = make(document.querySelector(".curves"), "fieldset", {id: "key"});
  make(key, "legend", {}, "Lines");
  key.hidden = lines.length === 1;
  if (lines.length > 2) {
    const buttons = make(key, "div", {class: "buttons"});
    addSwitch(buttons, "Show all", lines, true);
    addSwitch(buttons, "Hide all", lines, false);
  }
  const list = make(key, "div", {class: "names"});
  for (const line of lines) addName(list, line, lines);
  drawComparison(lines);
}

function addName(list, line, lines) {
  line.label = make(list, "label");
  const id = `line-${line.one.name}`;
  line.box = make(line.label, "input", {type: "checkbox", id});
  line.box.checked = !(recall().hidden ?? []).includes(line.one.name);
  addSwatch(line.label, line);
  make(line.label, "span", {}, line.name);
  line.box.addEventListener("change", () => switchLines(lines));
  for (const name of ["pointerenter", "focusin"]) {
    line.label.addEventListener(name, () => emphasise(line));
  }
  for (const name of ["pointerleave", "focusout"]) {
    line.label.addEventListener(name, () => emphasise(null));
  }
}

function addSwitch(parent, text, lines, isShown) {
  const id = text.toLowerCase().replace(" ", "-");
  make(parent, "button", {type: "button", id}, text).addEventListener("click", () => {
    for (const {box} of lines) box.checked = isShown;
    switchLines(lines);
  });
}

function switchLines(lines) {
  remember({hidden: lines.filter(({box}) => !box.checked).map(({one}) => one.name)});
  drawComparison(lines);
}

// Draws the lines that are switched on: the axes fit them.
function drawComparison(lines) {
  const shown = lines.filter(({box}) => box.checked).reverse();  // the newest above
  for (const {label, box} of lines) label.classList.toggle("off", !box.checked);
  find("charts").replaceChildren();
  if (!shown.length) {
    make(find("charts"), "p", {class: "soft"}, "All lines are switched off.");
    return;
  }
  const losses = shown.map(({one, colour, dash}) => {
    return {values: one.curve, every: one.curve_every, colour, dash};
  });
  chart("Training loss per step, smoothed", "step", losses, {log: true});
  const tests = shown.map(({one, colour, dash}) => {
    return {values: one.test_accuracy_per_epoch ?? [], colour, dash};
  });
  const tick = (y) => `${Number((100 * y).toPrecision(4))} %`;
  chart("Test accuracy per epoch", "epoch", tests, {format: percent, tick});
  for (const svg of find("charts").querySelectorAll("svg")) groupLines(svg, shown);
}

// Puts each line and its dots into a group, with the name of the run.
function groupLines(svg, shown) {
  const names = shown.map(({name}) => name).reverse();
  const title = svg.parentElement.querySelector("h3").textContent;
  svg.setAttribute("aria-label", `${title}. ${count(names.length, "run")}: ${names.join("; ")}`);
  const curves = [...svg.querySelectorAll("polyline")];
  curves.forEach((curve, n) => {
    const group = make(svg, "g", {class: "run-line"});
    make(group, "title", {}, shown[n].name);
    group.line = shown[n];
    while (curve.nextElementSibling?.tagName === "circle") group.append(curve.nextElementSibling);
    group.prepend(curve);
  });
}

// Makes a line stand out, and its row; null: none.
function emphasise(line) {
  for (const group of find("charts").querySelectorAll(".run-line")) {
    group.classList.toggle("faint", Boolean(line) && group.line !== line);
    group.classList.toggle("chosen", group.line === line);
  }
  document.querySelector("#overview .chosen")?.classList.remove("chosen");
  line?.row?.classList.add("chosen");
}
