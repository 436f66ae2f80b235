// Computes any network from the record of its operations that main.py has written.
//
//   decodeTensors(entries, isHalf)       {name: {shape, data: base64}} -> {name: tensor}
//   findUnsupported(program)             null, or the first call that cannot be computed
//   runNetwork(program, weights, image)  all tensors of a forward pass, by number
//   tensors[program.output.tensor]       what the network returns
//
// `weights` is {name: tensor}, `image` the numbers of tensor 0: 784 normalised pixels.
// program.operations is a list of {op, args, kwargs, result}: the name of a torch function or
// method, its arguments as they were passed, and the number of its result, or of several.
// The operations are in operations.js and layers.js; tensors.js has what they are made of.

const OPERATIONS = new Map(); // name -> {parameters, compute}

// Adds an operation to the table. compute(...) gets the values of its parameters in order.
//
// The signature lists the parameters as Python has them: `input stride=1 *size`. One with a
// star takes all positional arguments that are left, or one list of them. Values after a colon
// are the only ones that can be computed: `mode="nearest":"nearest","bilinear"`.
function defineOperation(names, signature, compute) {
  const parameters = signature.split(" ").map(readParameter);
  for (const name of names.split(" ")) OPERATIONS.set(name, {parameters, compute});
}

function readParameter(text) {
  const [, star, name, initial, choices] = text.match(/^(\*?)(\w+)(?:=([^:]+))?(?::(.+))?$/);
  return {
    name,
    isList: star === "*",
    initial: initial === undefined ? undefined : JSON.parse(initial),
    choices: choices === undefined ? null : JSON.parse(`[${choices}]`),
  };
}

// ----- Names and arguments --------------------------------------------------------------------

// add_, __add__ and __iadd__ are add; __radd__ is radd.
function findOperation(name) {
  const isOperator = /^__.*__$/.test(name);
  const plain = isOperator ? name.slice(2, -2) : name;
  const other = isOperator ? plain.replace(/^i/, "") : plain.replace(/_$/, "");
  return OPERATIONS.get(plain) ?? OPERATIONS.get(other);
}

const OTHER_NAMES = {axis: "dim", dims: "dim", keepdims: "keepdim", self: "input"};

// Arguments without an effect on the result here.
const HARMLESS = ["inplace", "_stacklevel", "device", "non_blocking", "copy", "memory_format",
  "requires_grad", "layout", "pin_memory"];
const isHarmless = (name, value) =>
  HARMLESS.includes(name) || (value ?? "torch.float32") === "torch.float32";

// Returns the values of an operation's parameters, and what is wrong with them, or null.
function bindArguments(parameters, args, kwargs) {
  const rest = [...args];
  const named = {};
  for (const [name, value] of Object.entries(kwargs)) {
    const isKnown = parameters.some((one) => one.name === name);
    named[isKnown ? name : (OTHER_NAMES[name] ?? name)] = value;
  }
  const values = parameters.map((parameter) => takeArgument(parameter, rest, named));
  const problems = rest.map((value) => `..., ${describe(value)}`);
  for (const [name, value] of Object.entries(named)) {
    if (!isHarmless(name, value)) problems.push(`${name}=${describe(value)}`);
  }
  parameters.forEach(({name, choices}, n) => {
    const isAllowed = !choices || choices.includes(values[n]);
    if (values[n] === undefined) problems.push(`no ${name}`);
    else if (!isAllowed) problems.push(`${name}=${describe(values[n])}`);
  });
  return {values, problem: problems[0] ?? null};
}

// Moves a parameter's value out of the named or the positional arguments.
function takeArgument({name, isList, initial}, rest, named) {
  if (name in named) {
    const value = named[name];
    delete named[name];
    return value;
  }
  if (!rest.length) return isList ? initial ?? [] : initial;
  if (!isList) return rest.shift();
  const values = rest.splice(0);
  return values.length === 1 && Array.isArray(values[0]) ? values[0] : values;
}

// Returns a recorded value as Python would show it.
function describe(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(describe).join(", ")}]`;
  return typeof value === "object" ? "a tensor" : String(value);
}

// Returns what computes a recorded call, the values for it, and, as far as the arguments show
// that it cannot be computed, what to call it; otherwise null.
function prepareCall({op, args, kwargs}) {
  const operation = findOperation(op);
  if (!operation) return {problem: op};
  const {values, problem} = bindArguments(operation.parameters, args, kwargs);
  return {compute: operation.compute, values, problem: problem && `${op}(${problem})`};
}

// ----- A forward pass -------------------------------------------------------------------------

function findUnsupported(program) {
  for (const call of program.operations) {
    const {problem} = prepareCall(call);
    if (problem) return problem;
  }
  return null;
}

function decodeTensors(entries, isHalf = false) {
  const tensors = {};
  for (const [name, {shape, data}] of Object.entries(entries)) {
    tensors[name] = makeTensor(shape, decodeFloats(data, isHalf));
  }
  return tensors;
}

const decodedConstants = new WeakMap(); // program -> {name: tensor}

function constantsOf(program) {
  if (!decodedConstants.has(program)) {
    decodedConstants.set(program, decodeTensors(program.constants));
  }
  return decodedConstants.get(program);
}

// Numbers that JSON does not have, as Python and as JavaScript write them.
const NUMBERS = {inf: Infinity, "-inf": -Infinity, nan: NaN, Infinity, "-Infinity": -Infinity, NaN};

// Returns an argument with the tensors that its references mean.
function resolve(value, known) {
  if (typeof value === "string") return NUMBERS[value] ?? value;
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value)) return value.map((part) => resolve(part, known));
  if ("slice" in value) return value;
  const [[kind, name]] = Object.entries(value);
  const tensor = known[kind]?.[name];
  if (!tensor) throw new Error(`This page does not know the ${kind} ${name}.`);
  return tensor;
}

// Numbers the results of an operation: a tensor, or a list of tensors and nulls.
function storeResults(reference, result, op, program, tensors) {
  if (Array.isArray(reference)) {
    reference.forEach((one, n) => storeResults(one, result?.[n], op, program, tensors));
  } else if (reference) {
    const expected = program.shapes[reference.tensor];
    if (!result?.shape || !isSameShape(result.shape, expected)) {
      const shape = result?.shape ?? "nothing";
      throw new Error(`This page cannot compute ${op}: (${shape}) instead of (${expected}).`);
    }
    tensors[reference.tensor] = result;
  }
}

function runNetwork(program, weights, image) {
  const tensors = [makeTensor(program.shapes[0], Float32Array.from(image))];
  const known = {tensor: tensors, weight: weights, constant: constantsOf(program)};
  if (image.length !== countOf(program.shapes[0])) throw new Error("Not the size of the image.");
  for (const call of program.operations) {
    storeResults(call.result, computeCall(call, known), call.op, program, tensors);
  }
  return tensors;
}

function computeCall(call, known) {
  const {compute, values, problem} = prepareCall(call);
  if (problem) throw new Error(`This page cannot compute ${problem}.`);
  try {
    return compute(...values.map((value) => resolve(value, known)));
  } catch (error) {
    throw new Error(`This page cannot compute this ${call.op} (${error.message}).`);
  }
}
