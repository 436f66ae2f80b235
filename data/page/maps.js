"use strict";
// What the network sees: feature maps and filters, found in the record of its operations.

const MOST = 64;  // pictures of a layer at once
const OPEN = 3;  // layers shown from the start
const ACTIVATION =
  /^(relu6|leaky_relu|prelu|elu|selu|celu|gelu|silu|mish|hardswish|hardtanh|tanh|sigmoid)_?$/;

// An argument of a recorded call, by place or by name.
const argument = (call, at, name) => call.args[at] ?? call.kwargs[name];
const inputOf = (call) => argument(call, 0, "input");
const weightOf = (call) => argument(call, 1, "weight")?.weight;  // its name, if it has one

// ----- Which tensors to show -------------------------------------------------------------------

// Follows the result of a layer to its activation. Returns the number of the tensor to show,
// and what has been applied to it. A ReLU after max-pooling can be applied before it.
function findActivation(result) {
  let tensor = result;
  let isPooled = false;
  for (let at = result; ;) {
    const next = run.program.operations.find((call) => inputOf(call)?.tensor === at);
    if (!next) return {tensor};
    if (/^relu_?$/.test(next.op)) return {tensor, after: "ReLU"};
    if (ACTIVATION.test(next.op) && !isPooled) {
      return {tensor: next.result.tensor, after: next.op.replace(/_$/, "")};
    }
    if (next.op === "max_pool2d") isPooled = true;
    else if (next.op === "batch_norm" && !isPooled) tensor = next.result.tensor;
    else if (!next.op.includes("dropout")) return {tensor};
    at = next.result.tensor;
  }
}

// Returns the layers to show: all convolutions; without any, the first linear layer.
// A layer: {name, weight, tensor, after, count, size: [width, height], kind}.
function findLayers() {
  const {operations} = run.program;
  const convolutions = operations.filter(({op}) => op === "conv2d");
  if (convolutions.length) return convolutions.map(describeConvolution);
  return operations.filter(({op}) => op === "linear").slice(0, 1).map(describeLinear);
}

function describeLayer(call) {
  const weight = weightOf(call);
  return {name: weight?.replace(/\.weight$/, ""), weight, ...findActivation(call.result.tensor)};
}

function describeConvolution(call) {
  const layer = describeLayer(call);
  const shape = run.program.shapes[layer.tensor];  // N × C × H × W
  const [height, width] = shape.slice(-2);
  const maps = shape.slice(0, -2).reduce((a, b) => a * b, 1);
  const title = `feature maps of ${height}×${width}`;
  const name = layer.name ?? "convolution";
  return {...layer, name, count: maps, size: [width, height], kind: "Feature map", title};
}

// One value for each unit; or, if there are several rows, one picture of them all.
function describeLinear(call) {
  const layer = describeLayer(call);
  const shape = run.program.shapes[layer.tensor];
  const units = shape[shape.length - 1];
  const rows = shape.reduce((a, b) => a * b, 1) / units;
  const name = layer.name ?? "linear layer";
  if (rows === 1) return {...layer, name, count: units, size: [1, 1], kind: "Unit", title: "units"};
  return {...layer, name, count: 1, size: [units, rows], kind: "Outputs",
    title: `picture of ${rows} rows with ${units} units each`};
}

// ----- Feature maps ----------------------------------------------------------------------------

let layers = [];  // what is shown: the layers with their gallery
let shown = null;  // all tensors for the drawing; null: nothing is drawn

function addMaps() {
  layers = findLayers();
  layers.forEach((layer, n) => {
    const details = make(find("maps"), "details", n < OPEN ? {open: ""} : {});
    const after = layer.after ? `, after ${layer.after}` : "";
    const title = `${layer.name}: ${layer.count} ${layer.title}${after}`;
    make(details, "summary", {}, title);
    layer.gallery = addGallery(details, layer, widthOnPage(layer), (canvas, index) => {
      showMap(canvas, layer, index);
    });
    layer.details = details;
    details.addEventListener("toggle", () => showLayer(layer));
    const {canvases} = layer.gallery;
    const columns = () => canvases.filter((one) => one.offsetTop === canvases[0].offsetTop).length;
    const leave = () => { find("zoom").hidden = true; };
    const show = (canvas, at) => enlarge(layer, layer.gallery.first + at, canvas);
    explore(canvases, columns, show, leave);
  });
}

// Returns how wide a picture of a layer is shown, in pixels of the page.
function widthOnPage({count: all, size: [width]}) {
  if (width === 1) return 30;
  if (all === 1) return Math.min(260, 6 * width);
  return Math.max(44, Math.min(56, 2 * width));
}

// Adds canvases for the pictures of a layer, MOST at once. paintOne(canvas, index) paints one.
function addGallery(parent, {count: all, size, kind}, wide, paintOne) {
  const row = make(parent, "div", {class: "row", role: "group"});
  const length = Math.min(MOST, all);
  const canvases = Array.from({length}, () => makeCanvas(row, size, wide, kind));
  const gallery = {first: 0, canvases, repaint};
  function repaint() {
    canvases.forEach((canvas, n) => {
      const index = gallery.first + n;
      canvas.hidden = index >= all;
      if (canvas.hidden) return;
      canvas.setAttribute("aria-label", `${kind} ${index + 1} of ${all}`);
      paintOne(canvas, index);
    });
  }
  if (all > MOST) addPager(parent, gallery, all);
  return gallery;
}

// A button that goes on to the next pictures, and from the last ones back to the first.
function addPager(parent, gallery, all) {
  const button = make(parent, "button", {type: "button", class: "pager"});
  const name = () => {
    const next = (gallery.first + MOST) % (MOST * Math.ceil(all / MOST));
    button.textContent = `Show ${next + 1} to ${Math.min(next + MOST, all)} of ${all}`;
    return next;
  };
  button.addEventListener("click", () => {
    gallery.first = name();
    name();
    gallery.repaint();
  });
  name();
}

// Returns the values of a layer's picture: count × height × width in all.
function valuesOf({tensor, size}, index) {
  const area = size[0] * size[1];
  return shown[tensor].data.subarray(index * area, (index + 1) * area);
}

// After ReLU the values are positive: grey. Others are orange if positive, blue if negative.
function showMap(canvas, layer, index) {
  if (!shown) {
    paint(canvas, new Uint8Array(canvas.width * canvas.height));
    return;
  }
  const values = valuesOf(layer, index);
  if (layer.after === "ReLU") showActivations(canvas, values, layer.largest);
  else showSigned(canvas, values, layer.largest);
}

function showLayer(layer) {
  if (!layer.details.open) return;
  if (shown) {
    const {data} = shown[layer.tensor];
    layer.largest = layer.after === "ReLU" ? Math.max(1e-9, highest(data)) : strongest(data);
  }
  layer.gallery.repaint();
}

// tensors: what runNetwork returns for the drawing; or null.
function showMaps(tensors) {
  shown = tensors;
  layers.forEach(showLayer);
}

// ----- A map enlarged, with the weights that make it -------------------------------------------

function enlarge(layer, index, canvas) {
  const zoom = find("zoom");
  const label = canvas.getAttribute("aria-label");
  zoom.replaceChildren();
  const figure = make(zoom, "figure");
  const wide = layer.size[0] === 1 ? 48 : 156;
  showMap(makeCanvas(figure, layer.size, wide, label), layer, index);
  const values = shown ? [...valuesOf(layer, index)] : [0];
  const most = layer.after === "ReLU" ? Math.max(0, highest(values)) : highest(values);
  make(figure, "figcaption", {}, `${label}. Highest value: ${most.toFixed(2)}`);
  addKernels(zoom, layer, index);
  zoom.hidden = false;
  placeBeside(zoom, canvas);
}

function addKernels(zoom, {weight, size}, index) {
  const {shape, data} = weightsOf(chosen)[weight] ?? {shape: []};
  const isImage = shape.length === 2 && shape[1] === 784 && size[0] === 1;
  if (shape.length !== 4 && !isImage) return;
  const [inputs, height, width] = isImage ? [1, 28, 28] : shape.slice(1);
  const area = height * width;
  const kernels = data.subarray(index * inputs * area, (index + 1) * inputs * area);
  const figure = make(zoom, "figure");
  const row = make(figure, "div", {class: "row"});
  const wide = inputs > 1 ? 22 : 96;
  for (let n = 0; n < Math.min(MOST, inputs); n++) {
    const canvas = makeCanvas(row, [width, height], wide, `filter ${n + 1}`);
    showSigned(canvas, kernels.subarray(n * area, (n + 1) * area), strongest(kernels));
  }
  const one = isImage ? "Its 28×28 weights" : `Its ${height}×${width} filter`;
  const many = `Its ${height}×${width} filters, one for each of its ${inputs} inputs`;
  const caption = inputs > 1 ? many : one;
  make(figure, "figcaption", {}, `${caption}. Orange: positive. Blue: negative.`);
}

function placeBeside(zoom, canvas) {
  const box = canvas.getBoundingClientRect();
  const around = zoom.parentElement.getBoundingClientRect();
  const isBelow = box.bottom + zoom.offsetHeight + 16 < innerHeight;
  const left = box.left - around.left + (box.width - zoom.offsetWidth) / 2;
  const top = isBelow ? box.bottom + 6 : box.top - zoom.offsetHeight - 8;
  zoom.style.left = `${Math.max(4, Math.min(left, around.width - zoom.offsetWidth - 6))}px`;
  zoom.style.top = `${top - around.top}px`;
}

// ----- The weights of the first layer ----------------------------------------------------------

let filters = null;  // their gallery

// Shows the filters of the first convolution, or the weights of a layer on the pixels.
function addFilters() {
  const calls = run.program ? run.program.operations : [];
  const shapeOf = (call) => run.weights[weightOf(call)]?.shape ?? [];
  const first = calls.find((call) => call.op === "conv2d" && shapeOf(call).length === 4)
    ?? calls.find((call) => call.op === "linear" && shapeOf(call)[1] === 784);
  if (!first) {
    find("first-layer").remove();
    return;
  }
  const shape = shapeOf(first);
  const isConvolution = first.op === "conv2d";
  const [inputs, height, width] = isConvolution ? shape.slice(1) : [1, 28, 28];
  const name = weightOf(first).replace(/\.weight$/, "");
  document.body.classList.toggle("dense", !isConvolution);
  find("filters-note").textContent = (isConvolution
    ? `${name}: ${shape[0]} filters of ${height}×${width} pixels slide over the image.`
    : `${name}: each of the ${shape[0]} units has 28×28 weights, one for each pixel.`) +
    " Orange weights are positive, blue ones negative, black ones near zero.";
  const layer = {count: shape[0], size: [width, height], kind: "Filter"};
  filters = addGallery(find("filters"), layer, isConvolution ? 44 : 50, (canvas, index) => {
    const start = index * inputs * height * width;
    const {data} = weightsOf(chosen)[weightOf(first)];
    showSigned(canvas, data.subarray(start, start + height * width));
  });
}
