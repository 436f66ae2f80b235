"use strict";
// What the curves of a run show: does it overfit?

const CLEAR_RISE = 1.1;  // of the test loss: less may be chance

// Draws the losses of each epoch in one picture, and the accuracies in another one.
function showEpochCurves({history, settings, state}) {
  const end = state === "training" ? settings.epochs : 0;
  const tick = (y) => `${Number((100 * y).toPrecision(4))} %`;
  const losses = pairCurves(history.train_loss, history.test_loss_per_epoch);
  const accuracies = pairCurves(history.train_accuracy, history.test_accuracy_per_epoch);
  chart("Loss per epoch", "epoch", losses, {end});
  chart("Accuracy per epoch", "epoch", accuracies, {end, format: percent, tick});
}

function pairCurves(training, test) {
  const other = {values: test, name: "test", colour: "var(--vermilion)", dash: "5 4"};
  return [{values: training, name: "training"}, other];
}

// Returns one or two sentences. history: lists with a value for each epoch.
function describeCurves(history, settings, state, message = "") {
  const {train_loss: training, train_accuracy: accuracy, test_loss_per_epoch: test} = history;
  const isDiverged = state === "failed" && message.includes("diverged");
  if (isDiverged || ![...training, ...test].every(Number.isFinite)) {
    return "The training diverged: the loss became infinite or not a number. " +
      "Try a lower learning rate.";
  }
  if (!training.length) return "No epoch was finished, so there is nothing to compare yet.";
  const failure = describeFailure(training, accuracy);
  if (failure) return failure;
  if (settings.recipe === "accurate") {
    return describeAccurate(training, test, history.test_accuracy_per_epoch);
  }
  const gap = describeGap(training, test);
  return `${gap} ${describeTrend(training, test, state === "training")}`.trim();
}

// Says whether the training itself went wrong.
function describeFailure(loss, accuracy) {
  const last = loss.length - 1;
  const lowestLoss = lowest(loss);
  if (accuracy[last] < 0.2) {
    const reason = loss[last] > 10  // equal probabilities for all digits give 2.3
      ? "The loss has exploded: try a lower learning rate."
      : "The learning rate is too high or too low, or there were too few steps.";
    return "The network has hardly learned anything: its training accuracy is " +
      `${percent(accuracy[last], 0)}, and guessing gives 10 %. ${reason}`;
  }
  if (loss[last] > 1.5 * lowestLoss + 0.2) {
    return `The training loss was lowest (${lowestLoss.toFixed(4)}) in epoch ` +
      `${loss.indexOf(lowestLoss) + 1} and is ${loss[last].toFixed(4)} now. ` +
      "Try a lower learning rate.";
  }
  return "";
}

// Compares training and test loss after the last epoch.
function describeGap(training, test) {
  const last = training.length - 1;
  const [one, other] = [training[last], test[last]].map((loss) => loss.toFixed(4));
  const gap = test[last] - training[last];
  const about = `After ${count(last + 1, "epoch")}, the test loss (${other}) is`;
  return gap > 0
    ? `${about} ${gap.toFixed(4)} above the training loss (${one}).`
    : `${about} below the training loss (${one}), which is the mean over an epoch in which the ` +
      "network still improved.";
}

// With label smoothing, a loss says little: the network is meant to be less confident, and the
// test loss may rise while the accuracy rises, too.
function describeAccurate(training, test, accuracies) {
  const last = training.length - 1;
  const [one, other] = [training[last], test[last]].map((loss) => loss.toFixed(4));
  const most = highest(accuracies);
  return `The training loss (${one}) is not to be compared with the test loss (${other}): label ` +
    "smoothing and distorted images raise it, and label smoothing also raises the test loss. " +
    `Look at the test accuracy: it was highest after epoch ${accuracies.indexOf(most) + 1} ` +
    `(${percent(most)}).`;
}

// Says whether the test loss falls or rises, and since when.
function describeTrend(training, test, isTraining) {
  const last = test.length - 1;
  const least = test.indexOf(lowest(test));
  const where = `The test loss was lowest after epoch ${least + 1} (${test[least].toFixed(4)})`;
  if (last < 2) {
    return isTraining ? "" : "Overfitting can be seen after a few more epochs.";
  }
  if (least === last) {
    const isFalling = test[last - 2] - test[last] > 0.05 * test[last];  // in two epochs
    return isFalling
      ? "The test loss is still falling: more epochs may help."
      : "The test loss has levelled off, but it does not rise.";
  }
  if (!isRising(test.slice(least))) return `${where} and does not clearly rise since.`;
  const overfits = training[last] < training[least];
  return overfits
    ? `${where} and has risen since, while the training loss fell further: the network overfits.`
    : `${where} and has risen since.`;
}

// Whether a loss rises clearly above its first value: steadily, or more than it goes up and down.
function isRising(losses) {
  const middle = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
  const changes = losses.slice(1).map((loss, n) => loss - losses[n]);
  if (changes.length < 2) return false;
  const end = middle(losses.slice(1).slice(-3));
  const isSteady = changes.every((change) => change > 0);
  const isStrong = end - losses[0] > 2 * middle(changes.map(Math.abs));
  return end > CLEAR_RISE * losses[0] && (isSteady || isStrong);
}
