"""What the fork server of conftest.py does once: it imports main.py, Comet and torchrun.

And it trains once, so that the runs that are forked from it find MNIST read and what
PyTorch and Matplotlib prepare at their first use.
"""

import contextlib
import gc
import io
import os
import tempfile

import torch.distributed.run  # noqa: F401

import main

os.environ.update(main.COMET_DEFAULTS)

import comet_ml  # noqa: F401

flags = "--limit=64", "--epochs=1", "--comet=off", "--output-dir"
with (
    tempfile.TemporaryDirectory() as folder,
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
):
    main.main([*flags, folder])
gc.freeze()  # no fork need look at what is here
