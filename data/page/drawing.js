"use strict";
// The drawing area, and how a drawing becomes an image as in MNIST.

const SIZE = 280;  // of the drawing area, in pixels
const FAR = 24;  // pixels between two digits: the gap in a 4 of two strokes is smaller
const FAINT = 0.05;  // less is paper

const paper = find("paper");
const pen = find("pen");
const context = paper.getContext("2d", {willReadFrequently: true});
const place = {x: 140, y: 60, down: false, pointer: null, kind: ""};  // of the pen
let drawn = false;  // whether there is something on the paper
let falsified = false;  // whether the browser changes the pixels that a page reads

// ----- A drawing becomes 28×28 pixels ----------------------------------------------------------

// Returns the ink: SIZE × SIZE values, 0 on paper, 1 in a stroke.
function readInk() {
  const {data} = context.getImageData(0, 0, SIZE, SIZE);  // red, green, blue, alpha
  const ink = new Float32Array(SIZE * SIZE);
  for (let n = 0; n < ink.length; n++) ink[n] = data[4 * n] / 255;
  return ink;
}

// Returns the connected parts of the ink: {members, top, left, bottom, right}, members: places.
function findParts(ink) {
  const isSeen = new Uint8Array(ink.length);
  const parts = [];
  for (let start = 0; start < ink.length; start++) {
    if (isSeen[start] || ink[start] < FAINT) continue;
    const members = [start];
    isSeen[start] = 1;
    for (const at of members) {  // which grow on the way
      for (const next of neighbours(at)) {
        if (isSeen[next] || !(ink[next] >= FAINT)) continue;
        isSeen[next] = 1;
        members.push(next);
      }
    }
    parts.push({members, ...boxOf(members)});
  }
  return parts;
}

function neighbours(at) {
  const column = at % SIZE;
  const found = [at - SIZE, at + SIZE];
  if (column > 0) found.push(at - 1);
  if (column < SIZE - 1) found.push(at + 1);
  return found;
}

// Returns the box around places; bottom and right are outside.
function boxOf(places) {
  const box = {top: SIZE, left: SIZE, bottom: 0, right: 0};
  for (const at of places) {
    const row = Math.floor(at / SIZE);
    const column = at % SIZE;
    box.top = Math.min(box.top, row);
    box.left = Math.min(box.left, column);
    box.bottom = Math.max(box.bottom, row + 1);
    box.right = Math.max(box.right, column + 1);
  }
  return box;
}

const widthOf = ({left, right}) => right - left;
const heightOf = ({top, bottom}) => bottom - top;

// Whether these are clearly several digits: side by side, or far apart. A digit may have
// several strokes; what is short, such as the bar of a 5, is no digit of its own.
function areSeveral(parts, main) {
  const all = boxOf(parts.flatMap(({top, left, bottom, right}) =>
    [top * SIZE + left, (bottom - 1) * SIZE + right - 1]));
  if (parts.length > 1 && widthOf(all) > 2 * heightOf(all)) return true;
  return parts.some((part) => {
    if (part === main || heightOf(part) < heightOf(main) / 2) return false;
    const across = Math.max(part.left, main.left) - Math.min(part.right, main.right);
    const down = Math.max(part.top, main.top) - Math.min(part.bottom, main.bottom);
    const isBeside = across > 0 && widthOf(all) > 1.1 * heightOf(all);
    return isBeside || Math.max(across, down) > FAR;
  });
}

// Returns null if nothing is drawn, else 28×28 grey levels, and whether there are several digits.
function prepareDrawing() {
  const ink = readInk();
  const parts = findParts(ink);
  if (!parts.length) return null;
  const main = parts.reduce((a, b) => b.members.length > a.members.length ? b : a);
  const isSpeck = ({members}) => members.length < 0.06 * main.members.length;
  const kept = parts.filter((part) => !isSpeck(part));
  for (const part of parts.filter(isSpeck)) {
    for (const at of part.members) ink[at] = 0;
  }
  return {pixels: centreDigit(ink), several: areSeveral(kept, main)};
}

// Returns the ink in 20×20 pixels, its mass centred in 28×28: as centre_digit in main.py.
function centreDigit(ink) {
  const inked = [];
  let mass = 0, massRow = 0, massColumn = 0;
  ink.forEach((value, at) => {
    if (value > 0.2) inked.push(at);
    mass += value;
    massRow += value * (Math.floor(at / SIZE) + 0.5);
    massColumn += value * (at % SIZE + 0.5);
  });
  const box = boxOf(inked);
  const scale = Math.max(widthOf(box), heightOf(box)) / 20;  // old pixels per new one
  const rows = shares(massRow / mass - 14.5 * scale, scale);
  const columns = shares(massColumn / mass - 14.5 * scale, scale);
  const narrow = new Float64Array(SIZE * 28);  // SIZE rows of 28
  for (let n = 0; n < narrow.length; n++) {
    const start = Math.floor(n / 28) * SIZE;
    for (const [at, share] of columns[n % 28]) narrow[n] += share * ink[start + at];
  }
  const digit = new Float64Array(784);
  for (let n = 0; n < 784; n++) {
    for (const [at, share] of rows[Math.floor(n / 28)]) {
      digit[n] += share * narrow[28 * at + n % 28];
    }
  }
  const most = highest(digit);
  return Uint8Array.from(digit, (value) => Math.round(255 * value / most));
}

// For each of 28 new pixels, `scale` old ones wide: the old ones in it, and their shares.
// (A triangle as wide as two new pixels: the BILINEAR of Pillow.)
function shares(start, scale) {
  const reach = Math.max(scale, 1);
  return Array.from({length: 28}, (_, n) => {
    const centre = start + (n + 0.5) * scale;
    const first = Math.floor(centre - reach + 0.5);
    const length = Math.floor(centre + reach + 0.5) - first;
    const near = Array.from({length}, (_, k) => {
      const distance = Math.abs(first + k + 0.5 - centre) / reach;
      return [first + k, Math.max(0, 1 - distance)];
    });
    const total = sum(near.map(([, share]) => share));
    const inside = near.filter(([at]) => at >= 0 && at < SIZE);
    return inside.map(([at, share]) => [at, share / total]);
  });
}

// ----- The pen ---------------------------------------------------------------------------------

function setDrawn(value) {
  drawn = value;
  document.body.classList.toggle("drawn", value);
  readSoon();
}

function drawTo({x, y}) {
  const look = {strokeStyle: "#fff", lineWidth: 22, lineCap: "round", lineJoin: "round"};
  Object.assign(context, look);
  context.stroke(new Path2D(`M${place.x} ${place.y}L${x + 0.01} ${y}`));
  Object.assign(place, {x, y});
  setDrawn(true);
}

function showPen() {
  pen.style.left = `${place.x}px`;
  pen.style.top = `${place.y}px`;
  pen.className = place.down ? "down" : "";
}

function clear() {
  context.fillStyle = "#000";
  context.fillRect(0, 0, SIZE, SIZE);
  falsified = readInk().some((value) => value > FAINT);
  Object.assign(place, {x: 140, y: 60, down: false, pointer: null});
  showPen();
  setDrawn(false);
}

function positionOf({clientX, clientY}) {
  const box = paper.getBoundingClientRect();
  const x = (clientX - box.left) * SIZE / box.width;
  const y = (clientY - box.top) * SIZE / box.height;
  return {x, y};
}

// One pointer draws; a pen takes over from a finger or a palm, and undoes what that drew.
function startStroke(event) {
  const isPen = event.pointerType === "pen";
  if (event.button !== 0) return;
  if (place.pointer !== null) {
    if (!isPen || place.kind === "pen") return;
    context.putImageData(place.before, 0, 0);
  }
  paper.setPointerCapture(event.pointerId);
  place.before = context.getImageData(0, 0, SIZE, SIZE);
  Object.assign(place, positionOf(event), {pointer: event.pointerId, kind: event.pointerType});
  drawTo(place);
}

function continueStroke(event) {
  if (event.pointerId !== place.pointer) return;
  const parts = event.getCoalescedEvents?.() ?? [];
  for (const part of parts.length ? parts : [event]) drawTo(positionOf(part));
}

function endStroke(event) {
  if (event.pointerId !== place.pointer) return;
  place.pointer = null;
  readSoon();
}

// The system has taken a touch for a palm, or for a gesture.
function undoStroke(event) {
  if (event.pointerId !== place.pointer) return;
  context.putImageData(place.before, 0, 0);
  endStroke(event);
}

const STEPS = {ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8]};

function pressKey(event) {
  const {key} = event;
  if (!STEPS[key] && ![" ", "Delete", "Backspace"].includes(key)) return;
  event.preventDefault();
  if (key === "Delete" || key === "Backspace") {
    clear();
    return;
  }
  if (key === " ") place.down = !place.down;
  const [dx, dy] = STEPS[key] ?? [0, 0];
  const inside = (value) => Math.min(SIZE - 11, Math.max(11, value));
  const [x, y] = [inside(place.x + dx), inside(place.y + dy)];
  if (place.down) drawTo({x, y});
  Object.assign(place, {x, y});
  showPen();
  readSoon();
}

function listen() {
  paper.addEventListener("pointerdown", startStroke);
  paper.addEventListener("pointermove", continueStroke);
  paper.addEventListener("pointerup", endStroke);
  paper.addEventListener("pointercancel", undoStroke);
  paper.addEventListener("focus", showPen);
  paper.addEventListener("keydown", pressKey);
  find("clear").addEventListener("click", clear);
  // A page that is reloaded has its drawing again.
  addEventListener("pagehide", () => {
    remember({drawing: drawn && !falsified ? paper.toDataURL() : null});
  });
}

async function restoreDrawing() {
  const {drawing} = recall();
  if (!drawing) return;
  const image = Object.assign(new Image(), {src: drawing});
  await image.decode();
  context.drawImage(image, 0, 0);
  setDrawn(true);
}
