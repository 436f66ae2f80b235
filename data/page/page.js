"use strict";
// What all parts of the page use; the start is at the end.

const find = (id) => document.getElementById(id);
const run = readRun();

// The data that main.py puts into the page. Python's NaN and Infinity become null.
function readRun() {
  const text = find("run").textContent;
  return JSON.parse(text.replace(/([[ ])(NaN|-?Infinity)(?=[,\]}])/g, "$1null"));
}

// Adds an element to `parent`.
function make(parent, tag, attributes = {}, text = "") {
  const isSvg = tag === "svg" || parent.closest("svg");
  const space = isSvg ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return parent.appendChild(element);
}

// Adds names and their values to a list of descriptions.
function addPairs(list, pairs) {
  const words = new Map([[true, "yes"], [false, "no"]]);
  for (const [name, value] of pairs) {
    const line = make(list, "div");
    make(line, "dt", {}, name.replaceAll("_", " "));
    make(line, "dd", {}, words.get(value) ?? value);
  }
}

// Numbers
const sum = (values) => values.reduce((a, b) => a + b, 0);
const lowest = (values) => values.reduce((a, b) => Math.min(a, b));
const highest = (values) => values.reduce((a, b) => Math.max(a, b));
const strongest = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-9);
const best = (chances) => chances.indexOf(highest(chances));
const percent = (x, digits = 2) => `${(100 * x).toFixed(digits)} %`;
const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

// Gives the browser time for other things, such as drawing.
const pause = () => new Promise((resolve) => setTimeout(resolve));

function attempt(act, otherwise) {
  try {
    return act();
  } catch {
    return otherwise;
  }
}

// ----- Memory: what the page knows after it was reloaded ---------------------------------------
// window.name serves where a page may not store anything, as in JupyterLab.

function recall() {
  const stored = attempt(() => sessionStorage.getItem(location.pathname), window.name);
  return attempt(() => JSON.parse(stored), null) || {};
}

function remember(more) {
  const text = JSON.stringify({...recall(), ...more});
  attempt(() => sessionStorage.setItem(location.pathname, text), null);
  if (!attempt(() => sessionStorage, null)) window.name = text;
}

// ----- The start, when all parts are there -----------------------------------------------------

document.addEventListener("DOMContentLoaded", async () => {
  if (!run) return;
  find("needs-script").remove();
  document.querySelector("main").hidden = false;
  if (run.command) find("command").textContent = run.command;
  if (run.state === "training") keepUpToDate();
  if (run.kind === "runs") showOverview();
  else await showRun();
  restorePlace();
});
