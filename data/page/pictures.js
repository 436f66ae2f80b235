"use strict";
// Pixels on canvases: digits, feature maps, weights.

// Adds a canvas of size [width, height], shown `wide` pixels wide.
function makeCanvas(parent, [width, height], wide, label) {
  const style = `width: ${wide}px`;
  return make(parent, "canvas", {width, height, style, role: "img", "aria-label": label});
}

// Paints each value in the colour (red, green, blue) that colourOf(value) says; or in grey.
function paint(canvas, values, colourOf = (value) => [value, value, value]) {
  const image = new ImageData(canvas.width, canvas.height);
  values.forEach((value, n) => image.data.set([...colourOf(value), 255], 4 * n));
  canvas.getContext("2d", {willReadFrequently: true}).putImageData(image, 0, 0);
}

// Positive values in grey, others black, as ReLU leaves them. The square root makes weak
// activations visible.
function showActivations(canvas, values, largest) {
  paint(canvas, values.map((value) => 255 * Math.sqrt(Math.max(0, value) / largest)));
}

// Orange: positive, blue: negative, black: zero.
function showSigned(canvas, values, largest = strongest(values)) {
  const colourOf = (value) => {
    const colour = value > 0 ? [255, 152, 60] : [60, 160, 255];
    return colour.map((part) => part * Math.abs(value) / largest);
  };
  paint(canvas, values, colourOf);
}

// Pointing at an element or focusing it shows it. All are one stop of the Tab key; the
// arrow keys go from one to the next, columns() to a row.
function explore(all, columns, show, leave = () => {}) {
  all.forEach((element, n) => {
    element.tabIndex = n ? -1 : 0;
    for (const name of ["pointerenter", "focus"]) {
      element.addEventListener(name, () => show(element, n));
    }
    for (const name of ["pointerleave", "blur"]) element.addEventListener(name, leave);
    element.addEventListener("keydown", (event) => {
      const row = columns();
      const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row}[event.key];
      const next = all[n + step];
      if (event.key === "Escape") leave();
      if (!next || next.hidden) return;
      event.preventDefault();
      element.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });
}

// Adds digits to `parent`: all, or those whose numbers are given.
function showDigits(parent, digits, numbers = digits.labels.keys(), isBrief = false) {
  const images = bytes(digits.images);
  for (const n of numbers) {
    const label = digits.labels[n];
    const digit = best(digits.probabilities[n]);
    const chance = percent(digits.probabilities[n][digit], 1);
    const isRight = digit === label;
    const figure = make(parent, "figure", isRight ? {} : {class: "wrong"});
    const canvas = makeCanvas(figure, [28, 28], 60, `test digit, true label ${label}`);
    paint(canvas, images.subarray(784 * n, 784 * (n + 1)));
    const text = `${isRight ? "✓" : "✗"} ${digit} (true ${label})\n${chance}`;
    make(figure, "figcaption", {}, isBrief ? chance : text);
  }
}
