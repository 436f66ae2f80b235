"use strict";
// The networks of a run, one for each epoch that was kept, and how they classify an image.

const networks = listNetworks();  // [{epoch, decode, weights}]: the last one is the latest
const last = networks.length - 1;
let chosen = last;  // the number of the network that the page uses

function listNetworks() {
  if (!run?.weights) return [];  // several runs
  const earlier = run.snapshots.map(({epoch, weights}) => ({
    epoch,
    decode: () => decodeWeights((name) => weights[name], true),
  }));
  const decode = () => decodeWeights((name) => run.weights[name].data, run.half);
  return [...earlier, {epoch: run.weights_epoch, decode}];
}

// Returns tensors by name: {shape, data}.
function decodeWeights(textOf, isHalf) {
  const weights = {};
  for (const [name, {shape}] of Object.entries(run.weights)) {
    weights[name] = {shape, data: decodeFloats(textOf(name), isHalf)};
  }
  return weights;
}

// Returns the weights of a network, decoded when they are first needed.
function weightsOf(number) {
  networks[number].weights ??= networks[number].decode();
  return networks[number].weights;
}

// pixels: 28×28 grey levels, 0 to 255. Returns what the network gets, moved by dy and dx.
function normalise(pixels, dy, dx) {
  const [mean, deviation] = run.mean_std;
  const view = new Float32Array(784);
  for (let n = 0; n < 784; n++) {
    const row = Math.floor(n / 28) + dy;
    const column = n % 28 + dx;
    const isInside = row >= 0 && row < 28 && column >= 0 && column < 28;
    const level = isInside ? pixels[28 * row + column] : 0;
    view[n] = (level / 255 - mean) / deviation;
  }
  return view;
}

// Returns all tensors that the network computes for an image, and its logits among them.
function compute(pixels, weights, dy = 0, dx = 0) {
  const tensors = runNetwork(run.program, weights, normalise(pixels, dy, dx));
  return {tensors, logits: [...tensors[run.program.output.tensor].data]};
}

// The same, but after the accurate recipe with the mean logits of nine views.
function classify(pixels, weights = weightsOf(last)) {
  const result = compute(pixels, weights);
  if (run.settings.recipe !== "accurate") return result;
  const total = new Array(10).fill(0);
  for (const dy of [-1, 0, 1]) {
    for (const dx of [-1, 0, 1]) {
      const {logits} = dy || dx ? compute(pixels, weights, dy, dx) : result;
      logits.forEach((logit, digit) => { total[digit] += logit; });
    }
  }
  return {...result, logits: total.map((logit) => logit / 9)};
}

function toChances(logits) {
  const most = highest(logits);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const total = sum(powers);
  return powers.map((power) => power / total);
}

// Returns why the page cannot compute this network; or "".
async function findReason() {
  if (run.check.logits.flat().includes(null)) {
    return "the training diverged: the network's outputs are not numbers any more.";
  }
  if (!run.program) return `${run.problem}.`;
  const name = findUnsupported(run.program);
  if (name) return `this page cannot compute ${name}, which the network uses.`;
  try {
    const isFaithful = await checkNetwork();
    return isFaithful ? "" : "this page does not compute the same as PyTorch for this network.";
  } catch (error) {
    return error.message.replace(/^This/, "this");
  }
}

// Whether the page computes what PyTorch has computed, for ten images.
async function checkNetwork() {
  const images = bytes(run.check.images);
  let start = performance.now();
  for (const [n, expected] of run.check.logits.entries()) {
    const {logits} = classify(images.subarray(784 * n, 784 * (n + 1)));
    const isSame = (x, digit) => Math.abs(x - expected[digit]) < 0.001 + 1e-5 * Math.abs(x);
    if (logits.length !== 10 || !logits.every(isSame)) return false;
    if (performance.now() - start < 50) continue;
    await pause();
    start = performance.now();
  }
  return true;
}

// Returns a tensor as it would be in float16: with 11 binary digits.
function roundToHalf({shape, data}) {
  const rounded = data.map((value) => {
    const power = Math.max(-14, Math.floor(Math.log2(Math.abs(value))));
    const step = 2 ** (power - 10);
    return value && step * Math.round(value / step);
  });
  return {shape, data: rounded};
}

// Says what float16 weights change for this drawing, measured with the latest network.
function describeRounding(pixels) {
  networks[last].rounded ??= Object.fromEntries(
    Object.entries(weightsOf(last)).map(([name, tensor]) => [name, roundToHalf(tensor)]),
  );
  const exact = toChances(classify(pixels).logits);
  const rounded = toChances(classify(pixels, networks[last].rounded).logits);
  const most = highest(exact.map((chance, n) => Math.abs(chance - rounded[n])));
  const isSame = best(exact) === best(rounded);
  if (isSame && most < 0.005) return "";
  const change = isSame
    ? `a probability by ${(100 * most).toFixed(1)} percentage points`
    : "the answer";
  return "Earlier epochs are stored with rounded weights (float16). " +
    `For this drawing that can change ${change}.`;
}
