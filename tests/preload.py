"""What the fork server of conftest.py does once: it imports main.py, Comet and torchrun.

And it trains once, so that the runs that are forked from it find MNIST read and what
PyTorch and Matplotlib prepare at their first use.
"""

import contextlib
import io
import os
import tempfile

import torch.distributed.run  # noqa: F401

import main

os.environ.update(main.COMET_DEFAULTS)

import comet_ml  # noqa: F401

quiet = io.StringIO()
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet):
    with contextlib.redirect_stderr(quiet):
        flags = "--limit=64", "--epochs=1", "--comet=off", f"--output-dir={folder}"
        main.main(flags)
import gc

gc.freeze()
