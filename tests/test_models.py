"""The two networks: their structure, and that they compute what their text says."""

import pytest
import torch
import torch.nn.functional as F

import main

PRINTED = """\
CNN(
  (conv1): Conv2d(1, 24, kernel_size=(3, 3), stride=(1, 1))
  (pool1): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
  (conv2): Conv2d(24, 36, kernel_size=(3, 3), stride=(1, 1))
  (pool2): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
  (flatten): Flatten(start_dim=1, end_dim=-1)
  (fc1): Linear(in_features=900, out_features=128, bias=True)
  (relu): ReLU()
  (fc2): Linear(in_features=128, out_features=10, bias=True)
)"""


@pytest.fixture(scope="module")
def digits():
    """300 training images (300, 1, 28, 28), normalised, and their labels."""
    images, labels, *_ = main.load_mnist(main.DATA_DIR)
    return (images[:300, None] / 255 - 0.1307) / 0.3081, labels[:300]


def plain_cnn(model, x):
    """The documented form: convolution, ReLU, max-pool; twice; two linear layers."""
    x = F.max_pool2d(F.relu(F.conv2d(x, model.conv1.weight, model.conv1.bias)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, model.conv2.weight, model.conv2.bias)), 2)
    return plain_fc(model, x)


def plain_fc(model, x):
    x = F.relu(F.linear(x.flatten(1), model.fc1.weight, model.fc1.bias))
    return F.linear(x, model.fc2.weight, model.fc2.bias)


def test_cnn_prints_as_documented():
    assert str(main.CNN()) == PRINTED


def test_the_number_of_parameters():
    kinds = main.CNN, main.FullyConnectedModel
    counts = [sum(p.numel() for p in kind().parameters()) for kind in kinds]
    assert counts == [124_670, 101_770]


def check(model, forward, plain, images, labels):
    """Logits and all gradients are the same, up to float32 rounding."""
    found = []
    for function in (forward, lambda x: plain(model, x)):
        model.zero_grad()
        logits = function(images)
        F.cross_entropy(logits, labels).backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().max() > 1e-4 for gradient in found[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cnn_is_the_documented_computation(digits, layout):
    """Also without the last two rows and columns, of which it sees nothing."""
    torch.manual_seed(0)
    model = main.CNN().to(memory_format=layout)
    check(model, model, plain_cnn, *digits)
    check(model, lambda x: model(x[..., :26, :26]), plain_cnn, *digits)


def test_fully_connected_model_is_the_documented_computation(digits):
    model = main.FullyConnectedModel()
    check(model, model, plain_fc, *digits)
