// Tensors, and the few primitives that every operation of a network is made of.
//
// A tensor is {shape, data}: data is a Float32Array with the numbers row by row, as PyTorch
// keeps them. Whole numbers and truth values (0 or 1) are floats, too. No function changes a
// tensor that it was given, so a result may share its data with the argument.

const countOf = (shape) => shape.reduce((product, size) => product * size, 1);
const isSameShape = (a, b) => a.length === b.length && a.every((size, dim) => size === b[dim]);
const countUp = (length) => Array.from({length}, (_, n) => n);

function makeTensor(shape, data = new Float32Array(countOf(shape))) {
  return {shape, data};
}

function fillTensor(shape, value) {
  return makeTensor(shape, new Float32Array(countOf(shape)).fill(value));
}

// Returns a number or a truth value as a tensor without dimensions, and a tensor as it is.
function toTensor(value) {
  if (typeof value === "object") return value;
  return makeTensor([], Float32Array.of(Number(value)));
}

// Returns the bytes of a base64 text as floats: float16 if isHalf, else float32.
function decodeFloats(text, isHalf = false) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  if (!isHalf) return new Float32Array(bytes.buffer);
  return Float32Array.from(new Uint16Array(bytes.buffer), decodeHalf);
}

// The 16 bits of a float16: sign, 5 bits of exponent, 10 bits of fraction.
function decodeHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  if (exponent === 0) return sign * fraction * 2 ** -14;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction) * 2 ** (exponent - 15);
}

// ----- Dimensions -----------------------------------------------------------------------------

// Returns an index or a dimension that may count from the end, as -1 does, from the start.
function wrapIndex(index, length) {
  const wrapped = index < 0 ? index + length : index;
  if (!(wrapped >= 0 && wrapped < length)) throw new Error(`index ${index} of ${length}`);
  return wrapped;
}

// Returns the dimensions that are meant: null, or an empty list, means all.
function listDims(dim, rank) {
  const dims = dim === null ? [] : [dim].flat();
  return dims.length ? dims.map((one) => wrapIndex(one, rank)) : countUp(rank);
}

// Returns how many blocks lie before a dimension, its length, and how many numbers a step is.
function splitAt(shape, dim) {
  const outer = countOf(shape.slice(0, dim));
  const inner = countOf(shape.slice(dim + 1));
  return {outer, length: shape[dim], inner};
}

function replaceDim(shape, dim, ...sizes) {
  return [...shape.slice(0, dim), ...sizes, ...shape.slice(dim + 1)];
}

function insertDim(x, dim) {
  return makeTensor([...x.shape.slice(0, dim), 1, ...x.shape.slice(dim)], x.data);
}

const removeDim = (x, dim) => makeTensor(replaceDim(x.shape, dim), x.data);

// One size may be -1: it is what the others leave.
function reshapeTensor(x, shape) {
  const rest = countOf(shape.filter((size) => size !== -1));
  const sizes = shape.map((size) => (size === -1 ? x.data.length / rest : size));
  if (countOf(sizes) !== x.data.length) throw new Error(`shape ${x.shape} to ${shape}`);
  return makeTensor(sizes, x.data);
}

// ----- Moving numbers -------------------------------------------------------------------------

function stridesOf(shape) {
  return shape.map((_, dim) => countOf(shape.slice(dim + 1)));
}

// Copies numbers that lie `strides` apart into a tensor of this shape.
function copyStrided(x, shape, strides) {
  const data = new Float32Array(countOf(shape));
  const width = shape.at(-1) ?? 1;
  const step = strides.at(-1) ?? 0;
  const place = shape.map(() => 0);
  let from = 0;
  for (let to = 0; to < data.length; to += width) {
    for (let n = 0; n < width; n++) data[to + n] = x.data[from + n * step];
    // On to the next row, as an odometer turns.
    for (let dim = shape.length - 2; dim >= 0; dim--) {
      from += strides[dim];
      place[dim] += 1;
      if (place[dim] < shape[dim]) break;
      from -= strides[dim] * shape[dim];
      place[dim] = 0;
    }
  }
  return makeTensor(shape, data);
}

function permuteTensor(x, order) {
  if (order.every((dim, n) => dim === n)) return x;
  const strides = stridesOf(x.shape);
  const pick = (values) => order.map((dim) => values[dim]);
  return copyStrided(x, pick(x.shape), pick(strides));
}

// Exchanges two dimensions.
function transposeTensor(x, dim0, dim1) {
  const order = countUp(x.shape.length);
  const [a, b] = listDims([dim0, dim1], order.length);
  order[a] = b;
  order[b] = a;
  return permuteTensor(x, order);
}

// Repeats dimensions of size 1. In `shape`, -1 means the size that is there.
function expandTensor(x, shape) {
  const added = shape.length - x.shape.length;
  const sizes = shape.map((size, dim) => (size === -1 ? x.shape[dim - added] : size));
  if (isSameShape(sizes, x.shape)) return x;
  const own = stridesOf(x.shape);
  const strides = sizes.map((size, dim) => {
    const ownSize = x.shape[dim - added] ?? 1;
    if (ownSize !== size && ownSize !== 1) throw new Error(`shape ${x.shape} to ${shape}`);
    return ownSize === 1 ? 0 : own[dim - added];
  });
  return copyStrided(x, sizes, strides);
}

// Takes these indices along a dimension, in this order; -1 is a place filled with `fill`.
function pickAlong(x, dim, indices, fill = 0) {
  const {outer, length, inner} = splitAt(x.shape, dim);
  const y = makeTensor(replaceDim(x.shape, dim, indices.length));
  let to = 0;
  for (let block = 0; block < outer; block++) {
    for (const index of indices) {
      if (index >= length) throw new Error(`index ${index} of ${length}`);
      const from = (block * length + index) * inner;
      for (let n = 0; n < inner; n++) y.data[to + n] = index < 0 ? fill : x.data[from + n];
      to += inner;
    }
  }
  return y;
}

const sliceAlong = (x, dim, start, length) =>
  pickAlong(x, dim, countUp(length).map((n) => start + n));

// Cuts a dimension into parts of these sizes.
function cutAlong(x, dim, sizes) {
  let start = 0;
  return sizes.map((size) => {
    start += size;
    return sliceAlong(x, dim, start - size, size);
  });
}

function joinAlong(tensors, dim) {
  const total = tensors.reduce((sum, {shape}) => sum + shape[dim], 0);
  const y = makeTensor(replaceDim(tensors[0].shape, dim, total));
  const {outer} = splitAt(y.shape, dim);
  let to = 0;
  for (let block = 0; block < outer; block++) {
    for (const {data} of tensors) {
      const width = data.length / outer;
      y.data.set(data.subarray(block * width, (block + 1) * width), to);
      to += width;
    }
  }
  return y;
}

// Puts places filled with `fill` before and after a dimension; fewer than 0 cut something off.
function padAlong(x, dim, before, after, fill = 0) {
  if (!before && !after) return x;
  const length = x.shape[dim];
  const indices = countUp(before + length + after).map((n) => n - before);
  return pickAlong(x, dim, indices.map((n) => (n < length ? n : -1)), fill);
}

// ----- Computing ------------------------------------------------------------------------------

function mapTensor(x, change) {
  const y = makeTensor(x.shape);
  for (let n = 0; n < y.data.length; n++) y.data[n] = change(x.data[n]);
  return y;
}

// The shape that tensors have together: each size is the one that is not 1.
function broadcastShapes(shapes) {
  const rank = Math.max(...shapes.map((shape) => shape.length));
  return countUp(rank).map((dim) => {
    const sizes = shapes.map((shape) => shape[dim - rank + shape.length] ?? 1);
    return sizes.find((size) => size !== 1) ?? 1;
  });
}

// Combines tensors, or numbers, that are broadcast to one shape: two or three of them.
function combineTensors(change, ...values) {
  const tensors = values.map(toTensor);
  const shape = broadcastShapes(tensors.map((one) => one.shape));
  const [a, b, c = b] = tensors.map((one) => expandTensor(one, shape));
  const y = makeTensor(shape);
  for (let n = 0; n < y.data.length; n++) y.data[n] = change(a.data[n], b.data[n], c.data[n]);
  return y;
}

const addTensors = (a, b) => combineTensors((x, y) => x + y, a, b);
const multiplyTensors = (a, b) => combineTensors((x, y) => x * y, a, b);

// Makes one number of all values over some dimensions: change(values) returns it.
function reduceTensor(x, dim, keepdim, change) {
  const rank = x.shape.length;
  const dims = listDims(dim, rank);
  const kept = countUp(rank).filter((one) => !dims.includes(one));
  const rows = permuteTensor(x, [...kept, ...dims]);
  const width = countOf(dims.map((one) => x.shape[one]));
  const whole = x.shape.map((size, one) => (dims.includes(one) ? 1 : size));
  const y = makeTensor(keepdim ? whole : kept.map((one) => x.shape[one]));
  for (let n = 0; n < y.data.length; n++) {
    y.data[n] = change(rows.data.subarray(n * width, (n + 1) * width));
  }
  return y;
}

// Makes a row of all values along one dimension: change(values) returns it.
function mapRows(x, dim, change) {
  const last = x.shape.length - 1;
  if (last < 0) return removeDim(mapRows(insertDim(x, 0), 0, change), 0);
  const rows = transposeTensor(x, dim, last);
  const width = rows.shape[last];
  const results = countUp(width ? rows.data.length / width : 0).map((n) =>
    change(rows.data.subarray(n * width, (n + 1) * width)));
  const y = makeTensor([...rows.shape.slice(0, last), results[0].length]);
  results.forEach((row, n) => y.data.set(row, n * row.length));
  return transposeTensor(y, dim, last);
}

// The dot products of rows: (batch, n, k) and (batch, m, k) become (batch, n, m).
function multiplyRows(a, b) {
  const [batch, n, k] = a.shape;
  const m = b.shape[1];
  const y = makeTensor([batch, n, m]);
  for (let one = 0; one < batch; one++) {
    const matrix = a.data.subarray(one * n * k, (one + 1) * n * k);
    const others = b.data.subarray(one * m * k, (one + 1) * m * k);
    const products = y.data.subarray(one * n * m, (one + 1) * n * m);
    for (let row = 0; row < n; row += 4) multiplyFourRows(matrix, others, products, row, n, m, k);
  }
  return y;
}

// Four rows at once are twice as fast as one. If fewer are left, the last one counts again.
function multiplyFourRows(a, b, y, row, n, m, k) {
  const row1 = Math.min(row + 1, n - 1);
  const row2 = Math.min(row + 2, n - 1);
  const row3 = Math.min(row + 3, n - 1);
  for (let column = 0; column < m; column++) {
    let sum0 = 0;
    let sum1 = 0;
    let sum2 = 0;
    let sum3 = 0;
    for (let i = 0; i < k; i++) {
      const value = b[column * k + i];
      sum0 += a[row * k + i] * value;
      sum1 += a[row1 * k + i] * value;
      sum2 += a[row2 * k + i] * value;
      sum3 += a[row3 * k + i] * value;
    }
    y[row * m + column] = sum0;
    y[row1 * m + column] = sum1;
    y[row2 * m + column] = sum2;
    y[row3 * m + column] = sum3;
  }
}

// The matrix product as torch.matmul has it, with vectors and with batches.
function multiplyMatrices(a, b) {
  const isRow = a.shape.length === 1;
  const isColumn = b.shape.length === 1;
  const rows = isRow ? insertDim(a, 0) : a; // (batch, n, k)
  const columns = isColumn ? insertDim(b, 0) : transposeTensor(b, -2, -1); // (batch, m, k)
  const [n, k] = rows.shape.slice(-2);
  const [m, depth] = columns.shape.slice(-2);
  if (k !== depth) throw new Error(`the product of shapes ${a.shape} and ${b.shape}`);
  const batch = broadcastShapes([rows.shape.slice(0, -2), columns.shape.slice(0, -2)]);
  const flatten = (x, count) =>
    reshapeTensor(expandTensor(x, [...batch, count, k]), [countOf(batch), count, k]);
  const products = multiplyRows(flatten(rows, n), flatten(columns, m)); // (batch, n, m)
  return makeTensor([...batch, ...(isRow ? [] : [n]), ...(isColumn ? [] : [m])], products.data);
}
