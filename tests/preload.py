"""What the fork server of conftest.py imports, once: main.py, Comet and torchrun."""

import gc
import os

import torch.distributed.run  # noqa: F401

import main

os.environ.update(main.COMET_DEFAULTS)

import comet_ml  # noqa: F401

gc.freeze()  # as main.py does: nothing of this is garbage
