// The operations that move numbers without computing: shapes, indices, joining and cutting.

// ----- The same numbers in another shape ------------------------------------------------------

// Whole numbers and truth values are floats here, too: only the values change.
function castTensor(x, targets, dtype) {
  const names = [...targets, dtype].filter((one) => String(one).startsWith("torch."));
  if (!names.length || ["torch.float32", "torch.float64"].includes(names[0])) return x;
  if (names[0] === "torch.bool") return mapTensor(x, (value) => value !== 0);
  if (/int/.test(names[0])) return mapTensor(x, Math.trunc);
  throw new Error(`This page cannot compute ${names[0]}.`);
}

defineOperation("contiguous clone detach data float double cpu cuda alias positive", "input",
  (x) => x);
defineOperation("requires_grad", "input requires_grad=true", (x) => x);
defineOperation("to type", "input *targets dtype=null", castTensor);
defineOperation("type_as", "input other", (x) => x);
defineOperation("long int", "input", (x) => castTensor(x, ["torch.int64"]));
defineOperation("bool", "input", (x) => castTensor(x, ["torch.bool"]));

// Evaluation leaves out nothing.
defineOperation(
  "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout",
  "input p=0.5 training=true:false inplace=false",
  (x) => x,
);

const flattenTensor = (x) => makeTensor([x.data.length], x.data);

defineOperation("view", "input *size", reshapeTensor);
defineOperation("reshape", "input *shape", reshapeTensor);
defineOperation("view_as reshape_as", "input other", (x, other) => reshapeTensor(x, other.shape));

defineOperation("flatten ravel", "input start_dim=0 end_dim=-1", (x, start, end) => {
  const rank = x.shape.length;
  if (!rank) return flattenTensor(x);
  const [first, last] = listDims([start, end], rank);
  const size = countOf(x.shape.slice(first, last + 1));
  return makeTensor([...x.shape.slice(0, first), size, ...x.shape.slice(last + 1)], x.data);
});

defineOperation("unflatten", "input dim sizes", (x, dim, sizes) =>
  reshapeTensor(x, replaceDim(x.shape, wrapIndex(dim, x.shape.length), ...sizes)));

defineOperation("squeeze", "input dim=null", (x, dim) => {
  const dims = listDims(dim, x.shape.length);
  return makeTensor(x.shape.filter((size, n) => size !== 1 || !dims.includes(n)), x.data);
});

defineOperation("unsqueeze", "input dim", (x, dim) =>
  insertDim(x, wrapIndex(dim, x.shape.length + 1)));

// ----- Another order --------------------------------------------------------------------------

defineOperation("permute", "input *dims", (x, order) =>
  permuteTensor(x, listDims(order, x.shape.length)));
defineOperation("transpose swapaxes swapdims", "input dim0 dim1", transposeTensor);
defineOperation("mT", "input", (x) => transposeTensor(x, -2, -1));
defineOperation("T t", "input", (x) => permuteTensor(x, countUp(x.shape.length).reverse()));

defineOperation("movedim moveaxis", "input source destination", (x, source, destination) => {
  const rank = x.shape.length;
  const from = listDims(source, rank);
  const to = listDims(destination, rank);
  const others = countUp(rank).filter((dim) => !from.includes(dim));
  const order = countUp(rank).map((dim) => (to.includes(dim) ? from[to.indexOf(dim)] : null));
  return permuteTensor(x, order.map((dim) => dim ?? others.shift()));
});

defineOperation("flip", "input *dims", (x, dims) =>
  listDims(dims, x.shape.length).reduce(
    (y, dim) => pickAlong(y, dim, countUp(y.shape[dim]).reverse()), x));

// Shifts along one dimension: what leaves at the end comes in at the start.
function rollAlong(x, dim, shift) {
  const length = x.shape[dim];
  const wrap = (n) => (((n - shift) % length) + length) % length;
  return pickAlong(x, dim, countUp(length).map(wrap));
}

defineOperation("roll", "input shifts dims=null", (x, shifts, dims) => {
  if (dims === null) return makeTensor(x.shape, rollAlong(flattenTensor(x), 0, shifts).data);
  const all = [shifts].flat();
  return listDims(dims, x.shape.length).reduce((y, dim, n) => rollAlong(y, dim, all[n]), x);
});

// (N, C·r·r, H, W) becomes (N, C, H·r, W·r), and back.
defineOperation("pixel_shuffle", "input upscale_factor", (x, r) => {
  const [channels, height, width] = x.shape.slice(-3);
  const batch = countOf(x.shape.slice(0, -3));
  const parts = makeTensor([batch, channels / r / r, r, r, height, width], x.data);
  const data = permuteTensor(parts, [0, 1, 4, 2, 5, 3]).data;
  return makeTensor([...x.shape.slice(0, -3), channels / r / r, height * r, width * r], data);
});

defineOperation("pixel_unshuffle", "input downscale_factor", (x, r) => {
  const [channels, height, width] = x.shape.slice(-3);
  const batch = countOf(x.shape.slice(0, -3));
  const parts = makeTensor([batch, channels, height / r, r, width / r, r], x.data);
  const data = permuteTensor(parts, [0, 1, 3, 5, 2, 4]).data;
  return makeTensor([...x.shape.slice(0, -3), channels * r * r, height / r, width / r], data);
});

defineOperation("channel_shuffle", "input groups", (x, groups) => {
  const parts = makeTensor(replaceDim(x.shape, 1, groups, x.shape[1] / groups), x.data);
  return makeTensor(x.shape, transposeTensor(parts, 1, 2).data);
});

// ----- Repeating ------------------------------------------------------------------------------

defineOperation("expand broadcast_to", "input *size", expandTensor);
defineOperation("expand_as", "input other", (x, other) => expandTensor(x, other.shape));

defineOperation("repeat tile", "input *repeats", (x, repeats) => {
  const added = repeats.length - x.shape.length;
  const whole = makeTensor([...Array(added).fill(1), ...x.shape], x.data);
  return repeats.reduce((y, times, dim) => {
    const length = y.shape[dim];
    return pickAlong(y, dim, countUp(times * length).map((n) => n % length));
  }, whole);
});

defineOperation("repeat_interleave", "input repeats dim=null", (x, times, dim) => {
  const whole = dim === null ? flattenTensor(x) : x;
  const along = wrapIndex(dim ?? 0, whole.shape.length);
  const indices = countUp(whole.shape[along] * times).map((n) => Math.floor(n / times));
  return pickAlong(whole, along, indices);
});

// ----- Parts ----------------------------------------------------------------------------------

// Returns the indices of a Python slice.
function listSlice([start, stop, step], length) {
  const place = (value) => clamp(value < 0 ? value + length : value, 0, length);
  const first = place(start ?? 0);
  const count = Math.ceil((place(stop ?? length) - first) / (step ?? 1));
  return countUp(Math.max(0, count)).map((n) => first + n * (step ?? 1));
}

// Takes places that a tensor, or a list, of whole numbers names: they become dimensions.
function pickPlaces(x, dim, places) {
  const {shape, data} = places.shape ? places : makeTensor([places.length], places);
  const indices = [...data].map((index) => wrapIndex(index, x.shape[dim]));
  return makeTensor(replaceDim(x.shape, dim, ...shape), pickAlong(x, dim, indices).data);
}

// x[index]: whole numbers, slices, None, ... and at most one list or tensor of whole numbers.
function indexTensor(x, index) {
  const items = Array.isArray(index) ? index : [index];
  const isPlaces = (item) => Array.isArray(item) || Boolean(item?.shape);
  if (items.filter(isPlaces).length > 1) throw new Error("This page cannot compute x[..., ...].");
  const used = (item) => item !== null && item !== "Ellipsis";
  let dim = 0;
  items.forEach((item, n) => {
    if (typeof item === "boolean") throw new Error(`This page cannot compute x[${item}].`);
    if (item === "Ellipsis") {
      dim = x.shape.length - items.slice(n + 1).filter(used).length;
    } else if (item === null) {
      x = insertDim(x, dim);
      dim += 1;
    } else if (typeof item === "number") {
      x = removeDim(pickAlong(x, dim, [wrapIndex(item, x.shape[dim])]), dim);
    } else if (isPlaces(item)) {
      x = pickPlaces(x, dim, item);
      dim += item.shape?.length ?? 1;
    } else {
      x = pickAlong(x, dim, listSlice(item.slice, x.shape[dim]));
      dim += 1;
    }
  });
  return x;
}

// An operation along one dimension, which may count from the end.
function defineAlong(names, signature, compute) {
  defineOperation(names, signature, (x, dim, ...rest) =>
    compute(x, wrapIndex(dim, x.shape.length), ...rest));
}

defineOperation("getitem", "input index", indexTensor);
defineAlong("select", "input dim index", (x, dim, index) =>
  pickPlaces(x, dim, toTensor(index)));
defineAlong("index_select", "input dim index", pickPlaces);
defineAlong("narrow", "input dim start length", (x, dim, start, length) =>
  sliceAlong(x, dim, start < 0 ? start + x.shape[dim] : start, length));
defineOperation(
  "embedding",
  "input weight padding_idx=null max_norm=null:null norm_type=2 scale_grad_by_freq=false " +
    "sparse=false",
  (x, weight) => pickPlaces(weight, 0, x),
);

// x.unfold(2, 7, 7): windows along a dimension, the places in one as the last dimension.
defineAlong("unfold", "input dimension size step", (x, dim, size, step) => {
  const count = Math.floor((x.shape[dim] - size) / step) + 1;
  const starts = countUp(count).map((n) => n * step);
  const indices = starts.flatMap((start) => countUp(size).map((n) => start + n));
  const parts = makeTensor(replaceDim(x.shape, dim, count, size), pickAlong(x, dim, indices).data);
  const others = countUp(parts.shape.length).filter((one) => one !== dim + 1);
  return permuteTensor(parts, [...others, dim + 1]);
});

// Keeps the lower, or the upper, triangle of each matrix.
function keepTriangle(x, isKept) {
  const [height, width] = x.shape.slice(-2);
  const place = (n) => (n % width) - (Math.floor(n / width) % height);
  return makeTensor(x.shape, x.data.map((value, n) => (isKept(place(n)) ? value : 0)));
}

defineOperation("tril", "input diagonal=0", (x, k) => keepTriangle(x, (place) => place <= k));
defineOperation("triu", "input diagonal=0", (x, k) => keepTriangle(x, (place) => place >= k));

// ----- Joining and cutting --------------------------------------------------------------------

defineOperation("cat concat concatenate", "tensors dim=0", (tensors, dim) => {
  const parts = tensors.filter((one) => !isSameShape(one.shape, [0]));
  return joinAlong(parts, wrapIndex(dim, parts[0].shape.length));
});
defineOperation("stack", "tensors dim=0", (tensors, dim) => {
  const at = wrapIndex(dim, tensors[0].shape.length + 1);
  return joinAlong(tensors.map((one) => insertDim(one, at)), at);
});

// Returns parts of `size`, and what is left.
function listSizes(length, size) {
  const starts = countUp(Math.ceil(length / size));
  return starts.map((n) => Math.min(size, length - n * size));
}

function cutInto(x, parts, dim) {
  const at = wrapIndex(dim, x.shape.length);
  return cutAlong(x, at, listSizes(x.shape[at], Math.ceil(x.shape[at] / parts)));
}

defineOperation("chunk", "input chunks dim=0", cutInto);
defineOperation("split split_with_sizes", "input split_size dim=0", (x, size, dim) => {
  const at = wrapIndex(dim, x.shape.length);
  return cutAlong(x, at, Array.isArray(size) ? size : listSizes(x.shape[at], size));
});
defineOperation("tensor_split", "input places dim=0", (x, places, dim) => {
  const at = wrapIndex(dim, x.shape.length);
  const length = x.shape[at];
  if (!Array.isArray(places)) {
    const sizes = countUp(places).map((n) => Math.floor((length + places - 1 - n) / places));
    return cutAlong(x, at, sizes);
  }
  const ends = [...places, length];
  return cutAlong(x, at, ends.map((end, n) => end - (ends[n - 1] ?? 0)));
});
defineOperation("unbind", "input dim=0", (x, dim) => {
  const at = wrapIndex(dim, x.shape.length);
  return cutAlong(x, at, Array(x.shape[at]).fill(1)).map((part) => removeDim(part, at));
});

// A gated linear unit: the first half of a dimension, as far as the second lets it through.
defineOperation("glu", "input dim=-1", (x, dim) => {
  const [value, gate] = cutInto(x, 2, dim);
  return combineTensors((a, b) => a * sigmoid(b), value, gate);
});

// ----- Borders and sizes ----------------------------------------------------------------------

// Returns where the number at a place outside 0 ... length - 1 comes from.
const BORDERS = {
  constant: (n, length) => (n >= 0 && n < length ? n : -1),
  replicate: (n, length) => clamp(n, 0, length - 1),
  circular: (n, length) => (n + length) % length,
  reflect: (n, length) => length - 1 - Math.abs(length - 1 - Math.abs(n)),
};

// sizes: before and after the last dimension, before and after the one before it, ...
defineOperation("pad", 'input pad mode="constant" value=null', (x, sizes, mode, value) => {
  const dims = countUp(sizes.length / 2);
  return dims.reduce((y, n) => {
    const dim = y.shape.length - 1 - n;
    const length = y.shape[dim];
    const [before, after] = sizes.slice(2 * n, 2 * n + 2);
    const places = countUp(before + length + after).map((place) => place - before);
    return pickAlong(y, dim, places.map((place) => BORDERS[mode](place, length)), value ?? 0);
  }, x);
});

// The place in the old row of each place in the new one, and so the share of its neighbours.
function resizeAlong(x, dim, size, scale, mode, isAligned) {
  const length = x.shape[dim];
  const alignedScale = (length - 1) / Math.max(size - 1, 1);
  const centre = (n) => (isAligned ? n * alignedScale : (n + 0.5) * scale - 0.5);
  const places = countUp(size).map((n) => clamp(centre(n), 0, length - 1));
  if (mode === "nearest") {
    const nearest = countUp(size).map((n) => Math.min(Math.floor(n * scale), length - 1));
    return pickAlong(x, dim, nearest);
  }
  const low = pickAlong(x, dim, places.map(Math.floor));
  const high = pickAlong(x, dim, places.map(Math.ceil));
  const sizes = low.shape.map((_, n) => (n === dim ? size : 1));
  const share = makeTensor(sizes, Float32Array.from(places, (place) => place % 1));
  return combineTensors((a, b, part) => a + part * (b - a), low, high, share);
}

defineOperation(
  "interpolate upsample",
  'input size=null scale_factor=null mode="nearest":"nearest","linear","bilinear","trilinear" ' +
    "align_corners=null recompute_scale_factor=null antialias=false:false",
  (x, size, factor, mode, isAligned, isRecomputed) => {
    const dims = countUp(x.shape.length).slice(2);
    const perDimension = (value) => (Array.isArray(value) ? value : dims.map(() => value));
    return dims.reduce((y, dim, n) => {
      const length = y.shape[dim];
      const ratio = perDimension(factor)[n];
      const target = perDimension(size)[n] ?? Math.floor(length * ratio);
      const scale = ratio === null || isRecomputed ? length / target : 1 / ratio;
      return resizeAlong(y, dim, target, scale, mode, isAligned);
    }, x);
  },
);

// ----- New tensors of the shape of another ----------------------------------------------------

for (const [name, value] of [["zeros", 0], ["ones", 1]]) {
  defineOperation(`${name}_like`, "input", (x) => fillTensor(x.shape, value));
  defineOperation(`new_${name}`, "input *size", (x, size) => fillTensor(size, value));
}
defineOperation("full_like", "input fill_value", (x, value) => fillTensor(x.shape, value));
defineOperation("new_full", "input size fill_value", (x, size, value) => fillTensor(size, value));
