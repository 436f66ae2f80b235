// Matrix products, and what is made of them: linear layers, attention, recurrent layers.

// x: (..., inputs), weight: (outputs, inputs) -> (..., outputs)
function computeLinear(x, weight, bias) {
  const [outputs, inputs] = weight.shape;
  const rows = makeTensor([1, x.data.length / inputs, inputs], x.data);
  const products = multiplyRows(insertDim(weight, 0), rows); // (1, outputs, rows)
  const y = transposeTensor(products, 1, 2); // (1, rows, outputs)
  const sums = makeTensor([...x.shape.slice(0, -1), outputs], y.data);
  return bias ? addTensors(sums, bias) : sums;
}

defineOperation("linear", "input weight bias=null", computeLinear);
defineOperation("matmul mm bmm mv dot", "input other", multiplyMatrices);
defineOperation("addmm baddbmm addmv", "input mat1 mat2 beta=1 alpha=1", (x, a, b, beta, alpha) =>
  combineTensors((value, product) => beta * value + alpha * product, x, multiplyMatrices(a, b)));
defineOperation("outer", "input vec2", (a, b) => multiplyTensors(insertDim(a, 1), b));

// Returns a tensor with a dimension for each letter, in this order; size 1 where it has none.
function spreadLetters(x, own, letters) {
  const dims = letters.map((letter) => own.indexOf(letter));
  const order = dims.filter((dim) => dim >= 0);
  return makeTensor(dims.map((dim) => x.shape[dim] ?? 1), permuteTensor(x, order).data);
}

// "bij,bjk->bik": the product of all, with a dimension for each letter, summed over the others.
defineOperation("einsum", "equation *operands", (equation, operands) => {
  const [left, right] = equation.replace(/ /g, "").split("->");
  const owns = left.split(",").map((text) => [...text]);
  const isPlain = owns.every((own) => new Set(own).size === own.length);
  if (right === undefined || equation.includes(".") || !isPlain) {
    throw new Error(`This page cannot compute einsum(${equation}).`);
  }
  const summed = [...new Set(owns.flat())].filter((letter) => !right.includes(letter));
  const letters = [...right, ...summed];
  const spread = operands.map((one, n) => spreadLetters(one, owns[n], letters));
  const product = spread.reduce(multiplyTensors);
  if (!summed.length) return product;
  const dims = summed.map((letter) => letters.indexOf(letter));
  return reduceTensor(product, dims, false, sumOf);
});

// ----- Attention ------------------------------------------------------------------------------

// query: (..., L, E), key and value: (..., S, E). Returns the result and the weights (..., L, S).
function attend(query, key, value, isCausal = false, scale = null) {
  const factor = scale ?? 1 / Math.sqrt(query.shape.at(-1));
  const products = multiplyMatrices(query, transposeTensor(key, -2, -1));
  const scores = mapTensor(products, (product) => product * factor);
  const [length, places] = scores.shape.slice(-2);
  if (isCausal) {
    const isLater = (n) => n % places > Math.floor(n / places) % length;
    scores.data.forEach((_, n) => isLater(n) && (scores.data[n] = -Infinity));
  }
  const weights = mapRows(scores, scores.shape.length - 1, (row) => softmaxRow(row));
  return [multiplyMatrices(weights, value), weights];
}

defineOperation(
  "scaled_dot_product_attention",
  "query key value attn_mask=null:null dropout_p=0:0 is_causal=false scale=null " +
    "enable_gqa=false:false",
  (query, key, value, mask, dropout, isCausal, scale) =>
    attend(query, key, value, isCausal, scale)[0],
);

// (L, N, E) becomes (N, heads, L, E / heads).
function splitHeads(x, heads) {
  const [length, batch, features] = x.shape;
  const parts = makeTensor([length, batch, heads, features / heads], x.data);
  return permuteTensor(parts, [1, 2, 0, 3]);
}

// query: (L, N, E), key and value: (S, N, E); one without N is a batch of one.
function computeHeads(inputs, heads, weight, bias, outWeight, outBias) {
  const weights = cutAlong(weight, 0, Array(3).fill(weight.shape[0] / 3));
  const biases = bias ? cutAlong(bias, 0, Array(3).fill(bias.shape[0] / 3)) : [];
  const [query, key, value] = inputs.map((x, n) =>
    splitHeads(computeLinear(x, weights[n], biases[n]), heads));
  const [mixed, shares] = attend(query, key, value);
  const joined = permuteTensor(mixed, [2, 0, 1, 3]); // (L, N, heads, E / heads)
  const flat = makeTensor(inputs[0].shape, joined.data); // (L, N, E)
  return [computeLinear(flat, outWeight, outBias), shares];
}

defineOperation(
  "multi_head_attention_forward",
  "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k=null:null " +
    "bias_v=null:null add_zero_attn=false:false dropout_p=0 out_proj_weight=null " +
    "out_proj_bias=null training=true:false key_padding_mask=null:null need_weights=true " +
    "attn_mask=null:null use_separate_proj_weight=false:false q_proj_weight=null " +
    "k_proj_weight=null v_proj_weight=null static_k=null:null static_v=null:null " +
    "average_attn_weights=true is_causal=false:false",
  (query, key, value, size, heads, weight, bias, biasK, biasV, zero, dropout, outWeight, outBias,
    training, paddingMask, needsWeights, mask, separate, q, k, v, staticK, staticV, isAverage) => {
    const isOne = query.shape.length === 2;
    const inputs = [query, key, value].map((x) => (isOne ? insertDim(x, 1) : x));
    const [y, shares] = computeHeads(inputs, heads, weight, bias, outWeight, outBias);
    const weights = isAverage ? reduceTensor(shares, 1, false, meanOf) : shares; // (N, L, S)
    const results = isOne ? [removeDim(y, 1), removeDim(weights, 0)] : [y, weights];
    return needsWeights ? results : [results[0], null];
  },
);

// ----- Recurrent layers -----------------------------------------------------------------------

const sigmoidOf = (x) => mapTensor(x, sigmoid);
const tanhOf = (x) => mapTensor(x, Math.tanh);
const cutGates = (x, count) => cutAlong(x, 1, Array(count).fill(x.shape[1] / count));

// One step: what comes from the input and from the last state, (N, gates · H), and the states
// (N, H); returns the new states. The first is the output.
const CELLS = {
  lstm: (fromInput, fromState, [, memory]) => {
    const [input, forget, candidate, output] = cutGates(addTensors(fromInput, fromState), 4);
    const kept = multiplyTensors(sigmoidOf(forget), memory);
    const added = multiplyTensors(sigmoidOf(input), tanhOf(candidate));
    const next = addTensors(kept, added);
    return [multiplyTensors(sigmoidOf(output), tanhOf(next)), next];
  },
  gru: (fromInput, fromState, [state]) => {
    const [resetX, updateX, newX] = cutGates(fromInput, 3);
    const [resetH, updateH, newH] = cutGates(fromState, 3);
    const reset = sigmoidOf(addTensors(resetX, resetH));
    const update = sigmoidOf(addTensors(updateX, updateH));
    const candidate = tanhOf(addTensors(newX, multiplyTensors(reset, newH)));
    return [combineTensors((a, b, share) => a + share * (b - a), candidate, state, update)];
  },
  rnn_tanh: (fromInput, fromState) => [tanhOf(addTensors(fromInput, fromState))],
  rnn_relu: (fromInput, fromState) =>
    [mapTensor(addTensors(fromInput, fromState), (x) => Math.max(x, 0))],
};

// One layer in one direction. x: (T, N, inputs); returns (T, N, H) and the last states.
function runCell(cell, x, states, [inputWeight, stateWeight, inputBias, stateBias], isReversed) {
  const times = countUp(x.shape[0]);
  const projected = computeLinear(x, inputWeight, inputBias); // (T, N, gates · H)
  const outputs = [];
  for (const time of isReversed ? times.reverse() : times) {
    const fromInput = removeDim(sliceAlong(projected, 0, time, 1), 0);
    const fromState = computeLinear(states[0], stateWeight, stateBias);
    states = cell(fromInput, fromState, states);
    outputs[time] = insertDim(states[0], 0);
  }
  return [joinAlong(outputs, 0), states];
}

function defineRecurrent(name, cell) {
  const signature = "input hx params has_biases num_layers dropout=0 train=false:false " +
    "bidirectional=false batch_first=false";
  defineOperation(name, signature,
    (x, start, params, hasBiases, layers, dropout, train, isBidirectional, isBatchFirst) => {
      const directions = isBidirectional ? 2 : 1;
      const starts = [start].flat(); // each (layers · directions, N, H)
      const width = hasBiases ? 4 : 2; // parameters of a layer and direction
      const finals = [];
      let y = isBatchFirst ? transposeTensor(x, 0, 1) : x; // (T, N, inputs)
      for (let layer = 0; layer < layers; layer++) {
        const outputs = countUp(directions).map((direction) => {
          const n = layer * directions + direction;
          const states = starts.map((one) => removeDim(sliceAlong(one, 0, n, 1), 0));
          const own = params.slice(n * width, (n + 1) * width);
          const [output, last] = runCell(cell, y, states, own, direction === 1);
          finals.push(last.map((state) => insertDim(state, 0)));
          return output;
        });
        y = joinAlong(outputs, 2);
      }
      const lasts = starts.map((_, n) => joinAlong(finals.map((states) => states[n]), 0));
      return [isBatchFirst ? transposeTensor(y, 0, 1) : y, ...lasts];
    });
}

for (const [name, cell] of Object.entries(CELLS)) defineRecurrent(name, cell);
