// The layers: convolution, pooling, normalisation, matrix products, attention, recurrence.

// Returns a value for each of several dimensions: one number means all of them.
function spreadOver(value, length) {
  const values = [value].flat();
  return values.length === length ? values : Array(length).fill(values[0]);
}

// ----- Convolution ----------------------------------------------------------------------------

// How often a kernel fits into a row or a column.
const countSteps = (length, kernel, stride, dilation) =>
  Math.floor((length - dilation * (kernel - 1) - 1) / stride) + 1;

// Lists what each place of a kernel covers, group by group of channels.
// x: (N, C, H, W) -> (N · groups, output height · width, C / groups · kernel height · width)
function listPatches(x, [rows, columns], stride, dilation, groups) {
  const [images, channels, height, width] = x.shape;
  const outHeight = countSteps(height, rows, stride[0], dilation[0]);
  const outWidth = countSteps(width, columns, stride[1], dilation[1]);
  const depth = channels / groups;
  const size = depth * rows * columns;
  const y = makeTensor([images * groups, outHeight * outWidth, size]);
  for (let n = 0; n < images * channels * rows * columns; n++) {
    const plane = Math.floor(n / (rows * columns));
    const row = (Math.floor(n / columns) % rows) * dilation[0];
    const column = (n % columns) * dilation[1];
    const patches = Math.floor(plane / depth) * outHeight * outWidth;
    for (let i = 0; i < outHeight; i++) {
      const from = (plane * height + i * stride[0] + row) * width + column;
      const to = (patches + i * outWidth) * size + (n % size);
      for (let j = 0; j < outWidth; j++) y.data[to + j * size] = x.data[from + j * stride[1]];
    }
  }
  return y;
}

// x: (N, C, H, W), padded already; weight: (O, C / groups, kernel height, kernel width).
function convolve(x, weight, bias, stride, dilation, groups) {
  const [images, , height, width] = x.shape;
  const [filters, depth, rows, columns] = weight.shape;
  const patches = listPatches(x, [rows, columns], stride, dilation, groups);
  const kernels = makeTensor([1, groups, filters / groups, depth * rows * columns], weight.data);
  const all = expandTensor(kernels, [images, -1, -1, -1]);
  const batch = makeTensor([images * groups, ...kernels.shape.slice(2)], all.data);
  const products = multiplyRows(batch, patches); // (N · groups, O / groups, places)
  const outHeight = countSteps(height, rows, stride[0], dilation[0]);
  const outWidth = countSteps(width, columns, stride[1], dilation[1]);
  const y = makeTensor([images, filters, outHeight, outWidth], products.data);
  return bias ? addTensors(y, alongChannels(bias, 4)) : y;
}

// Returns how many zeros come before and after a dimension.
function findPadding(padding, n, kernel, dilation) {
  if (padding === "valid") return [0, 0];
  if (padding !== "same") return [padding[n], padding[n]];
  const total = dilation * (kernel - 1);
  return [Math.floor(total / 2), Math.ceil(total / 2)];
}

// Calls compute on images of two dimensions; a signal of one dimension has one row.
// x: (N, C, W), (N, C, H, W), or one without N.
function asImages(x, rank, compute) {
  const isOne = x.shape.length === rank + 1;
  const batch = isOne ? insertDim(x, 0) : x;
  const y = rank === 1 ? removeDim(compute(insertDim(batch, 2)), 2) : compute(batch);
  return isOne ? removeDim(y, 0) : y;
}

// The values of a parameter for rows and columns.
const perDim = (value, rank, forRows) =>
  rank === 1 ? [forRows, [value].flat()[0]] : spreadOver(value, 2);

function defineConvolution(rank) {
  const signature = "input weight bias=null stride=1 padding=0 dilation=1 groups=1";
  defineOperation(`conv${rank}d`, signature, (x, weight, bias, stride, padding, ...others) => {
    const [dilation, groups] = others;
    const steps = perDim(stride, rank, 1);
    const gaps = perDim(dilation, rank, 1);
    const border = typeof padding === "string" ? padding : perDim(padding, rank, 0);
    const kernel = rank === 1 ? insertDim(weight, 2) : weight;
    return asImages(x, rank, (images) => {
      const padded = [0, 1].reduce((y, n) =>
        padAlong(y, n + 2, ...findPadding(border, n, kernel.shape[n + 2], gaps[n])), images);
      return convolve(padded, kernel, bias, steps, gaps, groups);
    });
  });
}

// (C, O / groups, ...) becomes (O, C / groups, ...), and the kernels are turned by 180 degrees.
function turnKernels(weight, groups) {
  const [channels, depth, rows, columns] = weight.shape;
  const grouped = makeTensor([groups, channels / groups, depth, rows * columns], weight.data);
  const swapped = permuteTensor(grouped, [0, 2, 1, 3]);
  const turned = pickAlong(swapped, 3, countUp(rows * columns).reverse());
  return makeTensor([groups * depth, channels / groups, rows, columns], turned.data);
}

// A convolution of the image with `stride - 1` zeros between its pixels.
function defineTransposedConvolution(rank) {
  const signature =
    "input weight bias=null stride=1 padding=0 output_padding=0 groups=1 dilation=1";
  defineOperation(`conv_transpose${rank}d`, signature,
    (x, weight, bias, stride, padding, outputPadding, groups, dilation) => {
      const steps = perDim(stride, rank, 1);
      const gaps = perDim(dilation, rank, 1);
      const cuts = perDim(padding, rank, 0);
      const added = perDim(outputPadding, rank, 0);
      const kernel = turnKernels(rank === 1 ? insertDim(weight, 2) : weight, groups);
      return asImages(x, rank, (images) => {
        const spread = [0, 1].reduce((y, n) => {
          const length = (y.shape[n + 2] - 1) * steps[n] + 1;
          const places = countUp(length).map((at) => (at % steps[n] ? -1 : at / steps[n]));
          const border = gaps[n] * (kernel.shape[n + 2] - 1) - cuts[n];
          return padAlong(pickAlong(y, n + 2, places), n + 2, border, border + added[n]);
        }, images);
        return convolve(spread, kernel, bias, [1, 1], gaps, groups);
      });
    });
}

// ----- Pooling --------------------------------------------------------------------------------

// The largest of a window, or its sum, is computed along one dimension after the other.
// windows: [{from, to, step}], places along the dimension; combine(a, b) of two numbers.
function poolAlong(x, dim, windows, combine) {
  const {outer, length, inner} = splitAt(x.shape, dim);
  const y = makeTensor(replaceDim(x.shape, dim, windows.length));
  let at = 0;
  for (let block = 0; block < outer; block++) {
    for (const {from, to, step} of windows) {
      const start = (block * length + from) * inner;
      for (let n = 0; n < inner; n++) {
        let value = x.data[start + n];
        for (let m = step; m < to - from; m += step) {
          value = combine(value, x.data[start + m * inner + n]);
        }
        y.data[at + n] = value;
      }
      at += inner;
    }
  }
  return y;
}

// Returns the windows along a dimension. `size` is the number of places that an average counts.
function listWindows(length, kernel, stride, padding, dilation, isCeiled, countsPadding) {
  const reach = dilation * (kernel - 1) + 1;
  const steps = (length + 2 * padding - reach) / stride;
  let count = (isCeiled ? Math.ceil(steps) : Math.floor(steps)) + 1;
  // A window that starts in the padding after the end is left out.
  if (isCeiled && (count - 1) * stride >= length + padding) count -= 1;
  return countUp(count).map((n) => {
    const start = n * stride - padding;
    const end = Math.min(start + reach, length + padding);
    const before = Math.max(0, Math.ceil(-start / dilation)); // places in the padding
    const from = start + before * dilation;
    const to = Math.min(end, length);
    return {from, to, step: dilation, size: countsPadding ? end - start : to - from};
  });
}

// Adaptive pooling: `count` windows that cover the dimension and may overlap.
function listAdaptiveWindows(length, count) {
  return countUp(count ?? length).map((n) => {
    const from = Math.floor((n * length) / count);
    const to = Math.ceil(((n + 1) * length) / count);
    return {from, to, step: 1, size: to - from};
  });
}

// Pools the last dimensions: makeWindows(length, n) returns the windows of the n-th of them.
function poolTensor(x, rank, makeWindows, combine, isAverage = false) {
  return countUp(rank).reduce((y, n) => {
    const dim = y.shape.length - rank + n;
    const windows = makeWindows(y.shape[dim], n);
    const pooled = poolAlong(y, dim, windows, combine);
    if (!isAverage) return pooled;
    const sizes = Float32Array.from(windows, ({size}) => size);
    const shape = pooled.shape.map((_, one) => (one === dim ? sizes.length : 1));
    return combineTensors((sum, size) => sum / size, pooled, makeTensor(shape, sizes));
  }, x);
}

const addNumbers = (a, b) => a + b;
const takeLarger = (a, b) => (a > b || a !== a ? a : b); // not a number stays

function defineMaxPooling(rank) {
  const signature = "input kernel_size stride=null padding=0 dilation=1 ceil_mode=false " +
    "return_indices=false:false";
  defineOperation(`max_pool${rank}d`, signature, (x, size, stride, padding, dilation, isCeiled) => {
    const [sizes, steps, borders, gaps] = [size, stride ?? size, padding, dilation]
      .map((value) => spreadOver(value, rank));
    const makeWindows = (length, n) =>
      listWindows(length, sizes[n], steps[n] ?? sizes[n], borders[n], gaps[n], isCeiled);
    return poolTensor(x, rank, makeWindows, takeLarger);
  });
}

function defineAveragePooling(rank) {
  const signature = "input kernel_size stride=null padding=0 ceil_mode=false " +
    "count_include_pad=true divisor_override=null";
  defineOperation(`avg_pool${rank}d`, signature,
    (x, size, stride, padding, isCeiled, countsPadding, divisor) => {
      const [sizes, steps, borders] = [size, stride ?? size, padding]
        .map((value) => spreadOver(value, rank));
      const makeWindows = (length, n) =>
        listWindows(length, sizes[n], steps[n] ?? sizes[n], borders[n], 1, isCeiled, countsPadding);
      const y = poolTensor(x, rank, makeWindows, addNumbers, divisor === null);
      return divisor === null ? y : mapTensor(y, (sum) => sum / divisor);
    });
}

function defineAdaptivePooling(rank) {
  const makeWindows = (sizes) => (length, n) =>
    listAdaptiveWindows(length, spreadOver(sizes, rank)[n] ?? length);
  defineOperation(`adaptive_avg_pool${rank}d`, "input output_size", (x, sizes) =>
    poolTensor(x, rank, makeWindows(sizes), addNumbers, true));
  defineOperation(`adaptive_max_pool${rank}d`, "input output_size return_indices=false:false",
    (x, sizes) => poolTensor(x, rank, makeWindows(sizes), takeLarger));
}

function definePowerPooling(rank) {
  const signature = "input norm_type kernel_size stride=null ceil_mode=false";
  defineOperation(`lp_pool${rank}d`, signature, (x, power, size, stride, isCeiled) => {
    const sizes = spreadOver(size, rank);
    const steps = spreadOver(stride ?? size, rank);
    const makeWindows = (length, n) =>
      listWindows(length, sizes[n], steps[n], 0, 1, isCeiled, true);
    const powers = mapTensor(x, (value) => value ** power);
    const means = poolTensor(powers, rank, makeWindows, addNumbers, true);
    const count = countOf(sizes);
    return mapTensor(means, (mean) => Math.max(mean * count, 0) ** (1 / power));
  });
}

[1, 2].forEach(defineConvolution);
[1, 2].forEach(defineTransposedConvolution);
[1, 2, 3].forEach(defineMaxPooling);
[1, 2, 3].forEach(defineAveragePooling);
[1, 2, 3].forEach(defineAdaptivePooling);
[1, 2].forEach(definePowerPooling);

// ----- Normalisation --------------------------------------------------------------------------

// Values for each channel, (C), as (1, C, 1, ...).
const alongChannels = (values, rank) =>
  makeTensor(countUp(rank).map((dim) => (dim === 1 ? values.data.length : 1)), values.data);

defineOperation("prelu", "input weight", (x, weight) => {
  const slopes = weight.data.length === 1 ? weight.data[0] : alongChannels(weight, x.shape.length);
  return combineTensors((value, slope) => (value > 0 ? value : slope * value), x, slopes);
});

function scaleAndShift(x, weight, bias) {
  const scaled = weight ? multiplyTensors(x, weight) : x;
  return bias ? addTensors(scaled, bias) : scaled;
}

const scaleChannels = (x, weight, bias) =>
  scaleAndShift(x, ...[weight, bias].map((one) => one && alongChannels(one, x.shape.length)));

function standardise(x, mean, variance, eps) {
  const change = (value, centre, spread) => (value - centre) / Math.sqrt(spread + eps);
  return combineTensors(change, x, mean, variance);
}

// Mean 0 and variance 1 over these dimensions.
function normaliseOver(x, dims, eps) {
  const mean = reduceTensor(x, dims, true, meanOf);
  return standardise(x, mean, reduceTensor(x, dims, true, (values) => varianceOf(values)), eps);
}

const lastDims = (x, count) => countUp(x.shape.length).slice(-count);

defineOperation(
  "batch_norm",
  "input running_mean running_var weight=null bias=null training=false momentum=0.1 eps=1e-5",
  (x, mean, variance, weight, bias, training, _, eps) => {
    const rank = x.shape.length;
    const others = countUp(rank).filter((dim) => dim !== 1);
    const normal = training
      ? normaliseOver(x, others, eps)
      : standardise(x, alongChannels(mean, rank), alongChannels(variance, rank), eps);
    return scaleChannels(normal, weight, bias);
  },
);

defineOperation("layer_norm", "input normalized_shape weight=null bias=null eps=1e-5",
  (x, shape, weight, bias, eps) =>
    scaleAndShift(normaliseOver(x, lastDims(x, shape.length), eps), weight, bias));

// The channels of a group are normalised together.
function normaliseGroups(x, groups, weight, bias, eps) {
  const parts = makeTensor([x.shape[0], groups, x.data.length / x.shape[0] / groups], x.data);
  const normal = makeTensor(x.shape, normaliseOver(parts, 2, eps).data);
  return scaleChannels(normal, weight, bias);
}

defineOperation("group_norm", "input num_groups weight=null bias=null eps=1e-5", normaliseGroups);

defineOperation(
  "instance_norm",
  "input running_mean=null running_var=null weight=null bias=null use_input_stats=true:true " +
    "momentum=0.1 eps=1e-5",
  (x, mean, variance, weight, bias, _, momentum, eps) =>
    normaliseGroups(x, x.shape[1], weight, bias, eps),
);

defineOperation("rms_norm", "input normalized_shape weight=null eps=null",
  (x, shape, weight, eps) => {
    const squares = mapTensor(x, (value) => value * value);
    const mean = reduceTensor(squares, lastDims(x, shape.length), true, meanOf);
    const small = eps ?? 2 ** -23; // what float32 can tell from 1
    const normal = combineTensors((value, one) => value / Math.sqrt(one + small), x, mean);
    return scaleAndShift(normal, weight);
  });

// Each channel is divided by a mean over its neighbours.
defineOperation("local_response_norm", "input size alpha=0.0001 beta=0.75 k=1",
  (x, size, alpha, beta, k) => {
    const squares = padAlong(mapTensor(x, (value) => value * value), 1,
      Math.floor(size / 2), Math.floor((size - 1) / 2));
    const sums = poolAlong(squares, 1, listWindows(squares.shape[1], size, 1, 0, 1), addNumbers);
    return combineTensors((value, sum) => value / (k + (alpha * sum) / size) ** beta, x, sums);
  });
