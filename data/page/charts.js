"use strict";
// Line charts, as SVG.

const LEFT = 44;  // of the plot, in an image of 316 × 285
const RIGHT = 308;
const TOP = 8;
const BOTTOM = 245;
const LOG_END = 2;  // a logarithmic axis ends at 100: a loss above it has exploded

// Returns round numbers from low to high, at most `most` steps apart.
function ticks(low, high, most = 5) {
  const unit = 10 ** Math.floor(Math.log10((high - low) / most));
  const step = [1, 2, 5, 10].map((n) => n * unit).find((size) => (high - low) / size <= most);
  const first = Math.ceil(low / step);
  const length = Math.floor(high / step) - first + 1;
  return Array.from({length}, (_, n) => Number(((first + n) * step).toPrecision(8)));
}

// The same for a logarithmic axis: 1, 2 and 5 of every power of ten, or 1 only, if these
// are enough. low and high are logarithms.
function logTicks(low, high) {
  const heads = high - low > 3 ? [1] : [1, 2, 5];
  const powers = Array.from({length: 20}, (_, n) => n - 10);
  const all = powers.flatMap((power) => heads.map((head) => Number(`${head}e${power}`)));
  const found = all.filter((y) => Math.log10(y) >= low && Math.log10(y) <= high);
  return found.length < 2 ? ticks(10 ** low, 10 ** high) : found;
}

// Returns the points (x, y) of a line to draw: at most about 1,000 of them.
function choosePoints({values, every = 1}, log) {
  const step = Math.ceil(values.length / 1000);
  const points = values.map((y, n) => [every * (n + 1), y]);
  return points.filter(([, y], n) => {
    const isChosen = (n + 1) % step === 0 || n + 1 === values.length;
    return isChosen && Number.isFinite(y) && (!log || y > 0);
  });
}

// Returns functions from data to the image: across(x) and up(y); and the ends of the axes.
function makeScales(points, {log, end}) {
  const scaled = log ? Math.log10 : (y) => y;
  const ys = points.map(([, y]) => scaled(y));
  const most = log ? Math.max(LOG_END, lowest(ys)) : Infinity;
  const top = Math.min(highest(ys), most);  // what is higher is drawn at the upper edge
  const space = 0.06 * (top - lowest(ys)) || 0.05 * Math.abs(ys[0]) || 0.05;
  const low = lowest(ys) - space;
  const high = top + space;
  const right = highest([end, ...points.map(([x]) => x)]);
  const left = right > 1 ? 1 : 0;
  const across = (x) => LEFT + (RIGHT - LEFT) * (x - left) / (right - left);
  const height = (y) => (Math.min(scaled(y), high) - low) / (high - low);
  const up = (y) => BOTTOM - (BOTTOM - TOP) * height(y);
  return {across, up, left, right, low, high};
}

// Adds a chart. lines: [{values, every, colour, dash, name}, …], every: steps per value;
// end: the last x to come.
function chart(title, xlabel, lines, options = {}) {
  const {log = false, format = (y) => y.toFixed(4), tick = tickText, end = 0} = options;
  const figure = make(find("charts"), "figure");
  make(figure, "h3", {}, title);
  const drawn = lines.map((line) => ({...line, points: choosePoints(line, log)}));
  const points = drawn.flatMap((line) => line.points);
  if (!points.length) {
    const isTraining = run.state === "training";
    const text = isTraining ? "Nothing to show yet." : "No epoch was finished.";
    make(figure, "p", {class: "soft"}, text);
    return;
  }
  const [from, to] = [points[0], points[points.length - 1]].map(([, y]) => format(y));
  const label = `${title}: from ${from} to ${to}`;
  const svg = make(figure, "svg", {viewBox: "0 0 316 285", role: "img", "aria-label": label});
  const scales = makeScales(points, {log, end});
  drawAxes(svg, scales, xlabel, log, tick);
  for (const line of drawn) drawLine(figure, svg, scales, line);
}

function tickText(y) {
  return y < 10_000 ? String(y) : Number(y.toPrecision(3)).toExponential().replace("+", "");
}

const write = (svg, x, y, text, anchor = "middle") =>
  make(svg, "text", {x, y, "text-anchor": anchor}, text);

function drawAxes(svg, {across, up, left, right, low, high}, xlabel, log, tick) {
  for (const y of log ? logTicks(low, high) : ticks(low, high)) {
    make(svg, "line", {x1: LEFT, x2: RIGHT, y1: up(y), y2: up(y), class: "grid"});
    write(svg, LEFT - 5, up(y) + 4, tick(y), "end");
  }
  for (const x of ticks(left, right, 7).filter(Number.isInteger)) {
    write(svg, across(x), BOTTOM + 17, x.toLocaleString("en"));
  }
  write(svg, (LEFT + RIGHT) / 2, BOTTOM + 34, xlabel);
}

function drawLine(figure, svg, {across, up}, line) {
  const {points, colour = "var(--blue)", dash = "", name} = line;
  const places = points.map(([x, y]) => `${across(x).toFixed(1)},${up(y).toFixed(1)}`);
  const look = {class: "curve", stroke: colour, "stroke-dasharray": dash};
  make(svg, "polyline", {points: places.join(" "), ...look});
  const dots = points.length < 40 ? points : [];
  for (const [x, y] of dots) make(svg, "circle", {cx: across(x), cy: up(y), r: 3, fill: colour});
  const key = dash ? "- - -" : "——";
  if (name) make(figure, "span", {class: "key", style: `color: ${colour}`}, `${key} ${name} `);
}
