"use strict";
// The section "Draw a digit": the answer of the network, and what it rests on.

const SLOW = 100;  // milliseconds for an answer: more, and it comes when the pen is lifted
const PATCH = 5;  // pixels: the side of the paper that covers a part of the digit

let waiting = 0;  // an answer is due
let fastest = 0;  // answer so far, in milliseconds

const isSlow = () => fastest > SLOW;

async function startDrawing() {
  find("answer").textContent = "Checking that this page computes the same as PyTorch …";
  const isKnown = run.state === "training" && recall().faithful === run.name;
  const problem = isKnown ? "" : await findReason();  // not checked again when reloaded
  addFilters();
  if (problem) {
    refuseDrawing(problem);
  } else {
    remember({faithful: run.name});
    addMaps();
    addSlider(find("rounding"));
    listen();
    clear();
    restoreDrawing();
  }
  if (filters) addSlider(find("filters"));
  chooseNetwork(last);
}

function refuseDrawing(problem) {
  const section = find("try");
  section.replaceChildren();
  make(section, "h2", {}, "Draw a digit");
  const text = make(section, "p", {id: "problem"}, `You cannot draw here: ${problem} To classify ` +
    "pictures with this network: ");
  make(text, "code", {}, "python main.py --predict photo.jpg");
}

// ----- The answer ------------------------------------------------------------------------------

// An answer comes with the next picture of the screen. A slow one waits for the pen.
function readSoon() {
  if (!isSlow()) {
    waiting = waiting || requestAnimationFrame(read);
    return;
  }
  clearTimeout(waiting);
  waiting = place.pointer === null ? setTimeout(read, 300) : 0;
}

function read() {
  const start = performance.now();
  waiting = 0;
  const digit = prepareDrawing();  // null, or {pixels, several}
  const pixels = digit ? digit.pixels : new Uint8Array(784);
  const result = digit && classify(pixels, weightsOf(chosen));
  const chances = digit ? toChances(result.logits) : new Array(10).fill(0);
  const {text, isSure} = describeAnswer(digit, chances);
  if (find("answer").textContent !== text) find("answer").textContent = text;
  showChances(digit, chances, isSure);
  paint(find("seen"), pixels);
  showMaps(result && result.tensors);
  find("rounding").textContent = describeEpoch(digit, pixels);
  const time = performance.now() - start;
  if (digit) fastest = Math.min(time, fastest || time);
  const isDrawing = place.pointer !== null;
  explain(isSure && !isDrawing ? pixels : null, best(chances));
}

// Returns what to say, and whether it is an answer.
function describeAnswer(digit, chances) {
  if (falsified) {
    const text = "No answer: this browser changes the pixels that a page reads, to protect your " +
      "privacy. To draw here, allow this page to read them (the picture icon in the address " +
      "bar), then choose Clear; or open the page in another browser.";
    return {text, isSure: false};
  }
  if (!digit) return {text: "Draw a digit here.", isSure: false};
  if (digit.several) return {text: "No answer: more than one digit. Draw only one.", isSure: false};
  const [first, second] = [...chances.keys()].sort((a, b) => chances[b] - chances[a]);
  const name = (n) => `${n} (${percent(chances[n], 1)})`;
  const text = `${name(first)}, then ${name(second)}`;
  const isSure = chances[first] - chances[second] >= 0.2;
  return {text: isSure ? text : `No answer: not clearly a digit. Closest: ${text}`, isSure};
}

function showChances(digit, chances, isSure) {
  const table = find("chances");
  table.replaceChildren();
  const isShown = digit && !falsified;
  chances.forEach((chance, n) => {
    const row = make(table, "tr", isSure && n === best(chances) ? {class: "best"} : {});
    make(row, "th", {scope: "row"}, n);
    const width = isShown ? 100 * chance : 0;
    make(make(row, "td"), "div", {class: "bar", style: `width: ${width}%`});
    make(row, "td", {}, isShown ? percent(chance, 1) : "–");
  });
}

// ----- The slider of epochs --------------------------------------------------------------------

// Adds a slider before an element; all of them move together.
function addSlider(element) {
  if (last < 1) return;
  const line = make(element.parentElement, "label", {class: "slider"}, "Epoch");
  element.before(line);
  const range = {type: "range", min: 0, max: last, value: last};
  const input = make(line, "input", {...range, "aria-label": "Epoch of the network"});
  input.addEventListener("input", () => chooseNetwork(Number(input.value)));
  make(line, "strong");
}

function chooseNetwork(number) {
  chosen = number;
  const {epoch} = networks[number];
  let name = String(epoch);
  if (number === last) name += ", latest";
  else if (!epoch) name += ", untrained";
  for (const line of document.querySelectorAll(".slider")) {
    const input = line.querySelector("input");
    input.value = number;
    input.setAttribute("aria-valuetext", name);
    line.querySelector("strong").textContent = name;
  }
  if (filters) filters.repaint();
  if (find("paper")) readSoon();
}

function describeEpoch(digit, pixels) {
  if (!networks[chosen].epoch) return "Epoch 0 is the untrained network: it guesses.";
  return digit && chosen < last ? describeRounding(pixels) : "";
}

// ----- What the answer rests on ----------------------------------------------------------------
// Occlusion: how much the probability of the answer falls when a patch of the digit is covered
// with paper. Zeiler and Fergus 2014, arXiv:1311.2901.

let explaining = 0;  // counts the maps: a new one ends the one before

// pixels: null removes the map.
async function explain(pixels, answer) {
  const mine = ++explaining;
  find("rests").hidden = true;
  if (!pixels) return;
  find("falls").hidden = isSlow();
  if (isSlow()) {
    find("rests-note").textContent = "This network takes too long here to find out.";
    find("rests").hidden = false;
    return;
  }
  const found = await measureFalls(pixels, answer, () => mine === explaining);
  if (!found) return;
  const {falls, most} = found;
  const strong = Math.max(highest(falls), 0.02);
  paint(find("falls"), [...pixels.keys()], (n) => colourFall(pixels[n], falls[n] / strong));
  const points = Math.round(100 * most);
  find("rests-note").textContent = most < 0.01
    ? `No single part decides: cover any ${PATCH}×${PATCH} pixels, and it stays ${answer}.`
    : `Orange: cover ${PATCH}×${PATCH} pixels here, and the probability of ${answer} falls, ` +
      `by up to about ${points} percentage point${points === 1 ? "" : "s"}.`;
  find("rests").hidden = false;
}

// Returns for each pixel how much the patches on it matter, on average, and the most that one
// patch matters; null if interrupted.
async function measureFalls(pixels, answer, isWanted) {
  await pause();
  if (!isWanted()) return null;
  const weights = weightsOf(chosen);
  const chanceOf = (image) => toChances(classify(image, weights).logits)[answer];
  const falls = new Float64Array(784);
  const covers = new Float64Array(784);
  let most = 0;
  let start = performance.now();
  const before = chanceOf(pixels);
  for (let top = 1 - PATCH; top < 28; top += 2) {
    for (let left = 1 - PATCH; left < 28; left += 2) {
      const places = patchAt(top, left);
      const isInked = places.some((n) => pixels[n]);
      const covered = Uint8Array.from(pixels);
      for (const n of places) covered[n] = 0;
      const fall = isInked ? before - chanceOf(covered) : 0;
      most = Math.max(most, fall);
      for (const n of places) {
        falls[n] += fall;
        covers[n] += 1;
      }
      if (performance.now() - start < 8) continue;
      await pause();
      if (!isWanted()) return null;
      start = performance.now();
    }
  }
  return {falls: falls.map((fall, n) => Math.max(0, fall / covers[n])), most};
}

function patchAt(top, left) {
  const places = [];
  for (let row = Math.max(0, top); row < Math.min(28, top + PATCH); row++) {
    for (let column = Math.max(0, left); column < Math.min(28, left + PATCH); column++) {
      places.push(28 * row + column);
    }
  }
  return places;
}

// The digit in grey, below orange as strong as `share`, 0 to 1.
function colourFall(level, share) {
  return [255, 140, 40].map((part) => share * part + (1 - share) * 0.6 * level);
}
