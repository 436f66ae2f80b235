"""What the fork server of conftest.py imports, once: main.py, Comet and torchrun."""

import os

import torch.distributed.run  # noqa: F401

import main

os.environ.update(main.COMET_DEFAULTS)

import comet_ml  # noqa: F401
