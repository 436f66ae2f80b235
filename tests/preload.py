"""What the fork server of conftest.py does once, for all runs that are forked from it.

It imports and uses all for the first time. It does not train: tqdm's lock would be
shared, and held by who is killed.
"""

import gc
import os
import tempfile

import torch.distributed.run  # noqa: F401

import main

os.environ.update(main.COMET_DEFAULTS)

import comet_ml  # noqa: F401

images, labels = main.load_mnist(main.DATA_DIR)[2:]
main.evaluate(main.CNN(), main.make_batches(images[:500], labels[:500], 250))
with tempfile.TemporaryDirectory() as folder:
    main.PeriodicPlotter(0, "x", "y", "semilogy", f"{folder}/curve.png").draw([2, 1])
gc.freeze()  # no fork need look at what is here
