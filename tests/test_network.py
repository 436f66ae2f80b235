"""The page's network.js computes what PyTorch computes: each operation, and whole networks."""

import json

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

import main

PARTS = ["tensors", "network", "operations", "shapes", "layers", "sequences"]


class Expression(nn.Module):
    """Computes an expression in x, or applies a module."""

    def __init__(self, text):
        super().__init__()
        code = text if text.startswith("nn.") else f"lambda x: {text}"
        self.compute = eval(code, {"torch": torch, "nn": nn, "F": F})

    def forward(self, x):
        result = self.compute(x)
        return result[0] if isinstance(result, tuple) else result


def convolution(inputs, outputs, stride=1):
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = convolution(1, 8), convolution(8, 8)
        self.third, self.short = convolution(8, 16, 2), nn.Conv2d(8, 16, 1, 2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(x)
        y = self.short(x)
        y += self.third(x)
        return self.fc(F.relu(y).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(28, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        outputs, (state, _) = self.lstm(x.squeeze(1))
        return self.fc(torch.cat([outputs[:, -1, :], state[0], state[-1]], dim=1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Linear(28, 32), nn.Linear(32, 10)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.rows = nn.LayerNorm(32), nn.Linear(28, 1)

    def forward(self, x):
        x = self.embed(x[:, 0])
        y, weights = self.attention(x, x, x)
        z, _ = self.attention(x, y, y, need_weights=False)
        return self.fc(self.norm(x + z).mean(1) * self.rows(weights).mean(1))


NETWORKS = [main.CNN, main.FullyConnectedModel, Residual, Recurrent, Attention]


@pytest.fixture(scope="module")
def page(browser):
    folder = ROOT / "data" / "page"
    texts = [(folder / f"{part}.js").read_text("utf-8") for part in PARTS]
    page = browser.contexts[0].new_page()
    page.add_script_tag(content='"use strict";\n' + "\n".join(texts))
    yield page
    page.close()


COMPUTE = """(text) => JSON.stringify(JSON.parse(text).map(({program, weights, images}) => {
  const problem = findUnsupported(program);
  if (problem) return problem;
  const tensors = decodeTensors(weights);
  const answer = (image) => runNetwork(program, tensors, decodeFloats(image));
  try {
    return images.map((image) => [...answer(image)[program.output.tensor].data]);
  } catch (error) {
    return error.message;
  }
}))"""


def encode(tensor):
    return main.encode(tensor.detach().float().numpy())


def make_case(model, images):
    """Return what the page gets, recorded with the first image, and PyTorch's answers."""
    model.eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():  # also running means and variances
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
        expected = torch.stack([model(image.clone()) for image in images])
    program = main.trace_program(model, images[0].clone())
    state = model.state_dict().items()
    weights = {name: {"shape": list(t.shape), "data": encode(t)} for name, t in state}
    images = [encode(image) for image in images]
    return {"program": program, "weights": weights, "images": images}, expected


def compute(page, cases):
    return json.loads(page.evaluate(COMPUTE, json.dumps(cases)))


def find_difference(answers, expected, tolerance):
    """Return what is wrong with the page's answers, or None."""
    if isinstance(answers, str):
        return answers
    numbers = torch.tensor(answers, dtype=torch.float32).flatten()
    expected = expected.detach().float().flatten()
    if not torch.allclose(numbers, expected, rtol=tolerance, atol=tolerance):
        return f"{numbers} instead of {expected}"


def read_table():
    """Yield the expressions of operations.txt, and the shape of x."""
    shape = None
    for line in (ROOT / "tests" / "operations.txt").read_text("utf-8").splitlines():
        if line.startswith("["):
            shape = json.loads(line)
        elif line and not line.startswith("#"):
            for text in line.split("; "):
                yield text, shape


@pytest.mark.filterwarnings("ignore:Using padding", "ignore:Implicit dimension")
def test_every_operation_is_as_in_pytorch(page):
    torch.manual_seed(0)
    rows = list(read_table())
    made = [make_case(Expression(text), torch.randn(1, *shape)) for text, shape in rows]
    answers = compute(page, [case for case, _ in made])
    wrong = []
    for row, answer, (_, expected) in zip(rows, answers, made):
        difference = find_difference(answer, expected, 1e-4)
        if difference:
            wrong.append(f"{row}: {difference}")
    assert len(rows) > 300
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_of_any_kind_is_as_in_pytorch(page, network):
    torch.manual_seed(0)
    case, expected = make_case(network(), torch.randn(10, 1, 1, 28, 28))
    (answers,) = compute(page, [case])
    assert find_difference(answers, expected, 1e-3) is None


UNSUPPORTED = {
    "torch.fft.fft2(x).abs()": "fft_fft2",
    "F.interpolate(x, (9, 9), mode='bicubic')": "interpolate(mode=bicubic)",
    "F.max_pool2d(x, 2, return_indices=True)": "max_pool2d_with_indices",
}


def test_it_names_what_it_cannot_compute(page):
    models = [Expression(text) for text in UNSUPPORTED]
    cases = [make_case(model, torch.randn(1, 2, 4, 6, 7))[0] for model in models]
    assert compute(page, cases) == list(UNSUPPORTED.values())
