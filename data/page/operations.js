// The operations on single numbers, over dimensions, and on shapes. layers.js has the layers.

// ----- Functions of one number ----------------------------------------------------------------

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: to 1.5e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const factors = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
  const sum = factors.reduce((total, factor) => (total + factor) * t, 0);
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

function gelu(x, approximate) {
  if (approximate === "none") return 0.5 * x * (1 + erf(x / Math.SQRT2));
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}

// Halves go to the even neighbour.
function roundHalfToEven(x) {
  const rounded = Math.round(x);
  return rounded - x === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

function selu(x) {
  return 1.0507009873554805 * (x > 0 ? x : 1.6732632423543772 * Math.expm1(x));
}

// compute(number, ...) gets the first two parameters after the input.
function defineMap(names, parameters, compute) {
  const signature = `input ${parameters}`.trim();
  defineOperation(names, signature, (x, a, b) => mapTensor(x, (value) => compute(value, a, b)));
}

defineMap("abs absolute", "", Math.abs);
defineMap("neg negative", "", (x) => -x);
defineMap("exp", "", Math.exp);
defineMap("expm1", "", Math.expm1);
defineMap("log", "", Math.log);
defineMap("log1p", "", Math.log1p);
defineMap("log2", "", Math.log2);
defineMap("log10", "", Math.log10);
defineMap("sqrt", "", Math.sqrt);
defineMap("rsqrt", "", (x) => 1 / Math.sqrt(x));
defineMap("square", "", (x) => x * x);
defineMap("reciprocal", "", (x) => 1 / x);
defineMap("sin", "", Math.sin);
defineMap("cos", "", Math.cos);
defineMap("tan", "", Math.tan);
defineMap("atan arctan", "", Math.atan);
defineMap("sign sgn", "", Math.sign);
defineMap("floor", "", Math.floor);
defineMap("ceil", "", Math.ceil);
defineMap("trunc fix", "", Math.trunc);
defineMap("round", "decimals=0:0", roundHalfToEven);
defineMap("erf special_erf", "", erf);
defineMap("logical_not", "", (x) => !x);

defineMap("relu", "", (x) => Math.max(x, 0));
defineMap("relu6", "", (x) => clamp(x, 0, 6));
defineMap("leaky_relu", "negative_slope=0.01", (x, slope) => (x > 0 ? x : slope * x));
defineMap("rrelu", "lower=0.125 upper=0.3333333333333333 training=false:false", (x, low, high) =>
  x > 0 ? x : (x * (low + high)) / 2);
defineMap("elu", "alpha=1", (x, alpha) => (x > 0 ? x : alpha * Math.expm1(x)));
defineMap("celu", "alpha=1", (x, alpha) => (x > 0 ? x : alpha * Math.expm1(x / alpha)));
defineMap("selu", "", selu);
defineMap("gelu", 'approximate="none":"none","tanh"', gelu);
defineMap("silu swish", "", (x) => x * sigmoid(x));
defineMap("hardswish", "", (x) => (x * clamp(x + 3, 0, 6)) / 6);
defineMap("hardsigmoid", "", (x) => clamp(x + 3, 0, 6) / 6);
defineMap("hardtanh", "min_val=-1 max_val=1", clamp);
defineMap("mish", "", (x) => x * Math.tanh(softplus(x)));
defineMap("sigmoid special_expit", "", sigmoid);
defineMap("tanh", "", Math.tanh);
defineMap("softplus", "beta=1 threshold=20", (x, beta, threshold) =>
  x * beta > threshold ? x : softplus(x * beta) / beta);
defineMap("softsign", "", (x) => x / (1 + Math.abs(x)));
defineMap("logsigmoid log_sigmoid", "", (x) => -softplus(-x));
defineMap("tanhshrink", "", (x) => x - Math.tanh(x));
defineMap("hardshrink", "lambd=0.5", (x, limit) => (Math.abs(x) > limit ? x : 0));
defineMap("softshrink", "lambd=0.5", (x, limit) => x - clamp(x, -limit, limit));
defineMap("threshold _threshold", "threshold value", (x, limit, value) => (x > limit ? x : value));

// ----- Functions of two or three numbers ------------------------------------------------------

function defineCombination(names, parameters, compute) {
  defineOperation(names, parameters, (...values) => combineTensors(compute, ...values));
}

function divide(x, y, rounding) {
  const change = {floor: Math.floor, trunc: Math.trunc}[rounding] ?? ((ratio) => ratio);
  return combineTensors((a, b) => change(a / b), x, y);
}

// 1 - x arrives as x.__rsub__(1): the names with an r have the second argument first.
defineCombination("add radd", "input other alpha=1", (x, y, alpha) => x + alpha * y);
defineCombination("sub subtract", "input other alpha=1", (x, y, alpha) => x - alpha * y);
defineCombination("rsub", "input other alpha=1", (x, y, alpha) => y - alpha * x);
defineCombination("mul multiply rmul", "input other", (x, y) => x * y);
defineOperation("div divide truediv true_divide", "input other rounding_mode=null", divide);
defineCombination("rdiv rtruediv", "input other", (x, y) => y / x);
defineCombination("floordiv floor_divide", "input other", (x, y) => Math.floor(x / y));
defineCombination("rfloordiv", "input other", (x, y) => Math.floor(y / x));
defineCombination("mod remainder", "input other", (x, y) => x - y * Math.floor(x / y));
defineCombination("pow", "input exponent", (x, y) => x ** y);
defineCombination("rpow", "input other", (x, y) => y ** x);
defineCombination("maximum", "input other", (x, y) => Math.max(x, y));
defineCombination("minimum", "input other", (x, y) => Math.min(x, y));
defineCombination("gt greater", "input other", (x, y) => x > y);
defineCombination("ge greater_equal", "input other", (x, y) => x >= y);
defineCombination("lt less", "input other", (x, y) => x < y);
defineCombination("le less_equal", "input other", (x, y) => x <= y);
defineCombination("eq", "input other", (x, y) => x === y);
defineCombination("ne not_equal", "input other", (x, y) => x !== y);
defineCombination("and bitwise_and", "input other", (x, y) => x & y);
defineCombination("or bitwise_or", "input other", (x, y) => x | y);
defineCombination("logical_and", "input other", (x, y) => x && y && 1);
defineCombination("logical_or", "input other", (x, y) => (x || y) && 1);
defineCombination("where", "condition input other", (is, x, y) => (is ? x : y));
defineCombination("masked_fill", "input mask value", (x, is, value) => (is ? value : x));
defineCombination("lerp", "input end weight", (x, y, weight) => x + weight * (y - x));
defineOperation("clamp clip", "input min=null max=null", (x, min, max) =>
  combineTensors(clamp, x, min ?? -Infinity, max ?? Infinity));
defineMap("clamp_min", "min", (x, min) => Math.max(x, min));
defineMap("clamp_max", "max", (x, max) => Math.min(x, max));
defineOperation("addcmul", "input tensor1 tensor2 value=1", (x, a, b, value) =>
  addTensors(x, multiplyTensors(multiplyTensors(a, b), value)));

// ----- Over dimensions ------------------------------------------------------------------------

const sumOf = (values) => values.reduce((sum, value) => sum + value, 0);
const meanOf = (values) => sumOf(values) / values.length;
const maximumOf = (values) => values.reduce((most, value) => Math.max(most, value), -Infinity);
const minimumOf = (values) => values.reduce((least, value) => Math.min(least, value), Infinity);
const logSumExp = (values) => {
  const largest = maximumOf(values);
  return largest + Math.log(values.reduce((sum, value) => sum + Math.exp(value - largest), 0));
};

// correction 1 is the sample variance.
function varianceOf(values, correction = 0) {
  const mean = meanOf(values);
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return squares / (values.length - correction);
}

function normOf(values, order) {
  if (order === Infinity) return values.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  return values.reduce((sum, value) => sum + Math.abs(value) ** order, 0) ** (1 / order);
}

function defineReduction(names, compute) {
  defineOperation(names, "input dim=null keepdim=false", (x, dim, keepdim) =>
    reduceTensor(x, dim, keepdim, compute));
}

defineReduction("sum", sumOf);
defineReduction("mean", meanOf);
defineReduction("prod", (values) => values.reduce((product, value) => product * value, 1));
defineReduction("amax", maximumOf);
defineReduction("amin", minimumOf);
defineReduction("argmax", (values) => values.indexOf(maximumOf(values)));
defineReduction("argmin", (values) => values.indexOf(minimumOf(values)));
defineReduction("any", (values) => values.some(Boolean));
defineReduction("all", (values) => values.every(Boolean));
defineReduction("logsumexp", logSumExp);

// x.max(): one number. x.max(1): the values and where they are. torch.max(x, y): elementwise.
function defineExtreme(name, extremeOf) {
  defineOperation(name, "input dim=null keepdim=false other=null", (x, dim, keepdim, other) => {
    const second = dim?.shape ? dim : other;
    if (second) return combineTensors((a, b) => extremeOf([a, b]), x, second);
    const values = reduceTensor(x, dim, keepdim, extremeOf);
    if (dim === null) return values;
    return [values, reduceTensor(x, dim, keepdim, (row) => row.indexOf(extremeOf(row)))];
  });
}

defineExtreme("max", maximumOf);
defineExtreme("min", minimumOf);

// x.var(False) has no dimension: it says "unbiased".
function defineSpread(name, change) {
  const signature = "input dim=null unbiased=true keepdim=false correction=null";
  defineOperation(name, signature, (x, dim, unbiased, keepdim, correction) => {
    const isUnbiased = typeof dim === "boolean" ? dim : unbiased;
    const subtract = correction ?? Number(isUnbiased);
    const dims = typeof dim === "boolean" ? null : dim;
    return reduceTensor(x, dims, keepdim, (row) => change(varianceOf(row, subtract)));
  });
}

defineSpread("var", (variance) => variance);
defineSpread("std", Math.sqrt);

const computeNorm = (x, order, dim, keepdim) =>
  reduceTensor(x, dim, keepdim, (row) => normOf(row, order === "fro" ? 2 : order));
defineOperation("norm", 'input p="fro" dim=null keepdim=false', computeNorm);
defineOperation("linalg_vector_norm", "input ord=2 dim=null keepdim=false", computeNorm);
defineOperation("linalg_norm", "input ord=null:null dim=null keepdim=false", (x, _, ...rest) =>
  computeNorm(x, 2, ...rest));
defineOperation("normalize", "input p=2 dim=1 eps=1e-12", (x, order, dim, eps) =>
  combineTensors((a, norm) => a / Math.max(norm, eps), x, computeNorm(x, order, dim, true)));

// Without a dimension: the channels, as PyTorch guesses.
const guessDim = (x, dim) => dim ?? ([0, 1, 3].includes(x.shape.length) ? 0 : 1);

function softmaxRow(row, sign = 1) {
  const signed = row.map((value) => sign * value);
  const total = logSumExp(signed);
  return signed.map((value) => Math.exp(value - total));
}

function logSoftmaxRow(row) {
  const total = logSumExp(row);
  return row.map((value) => value - total);
}

function accumulate(row) {
  let total = 0;
  return row.map((value) => (total += value));
}

function defineRows(names, signature, compute) {
  defineOperation(names, signature, (x, dim) => mapRows(x, guessDim(x, dim), compute));
}

defineRows("softmax", "input dim=null", (row) => softmaxRow(row));
defineRows("softmin", "input dim=null", (row) => softmaxRow(row, -1));
defineRows("log_softmax", "input dim=null", logSoftmaxRow);
defineRows("cumsum", "input dim", accumulate);

// Sorts each row: the values, and where they were.
function sortRows(x, dim, isDescending, count) {
  const sign = isDescending ? -1 : 1;
  const order = (row) =>
    [...row.keys()].sort((a, b) => sign * (row[a] - row[b])).slice(0, count);
  const values = mapRows(x, dim, (row) => order(row).map((n) => row[n]));
  return [values, mapRows(x, dim, order)];
}

defineOperation("sort", "input dim=-1 descending=false", sortRows);
defineOperation("argsort", "input dim=-1 descending=false", (...values) => sortRows(...values)[1]);
defineOperation("topk", "input k dim=-1 largest=true sorted=true", (x, count, dim, largest) =>
  sortRows(x, dim, largest, count));
