"""What the fork server of conftest.py imports, once: main.py, and Comet as main.py does."""

import os

import main

os.environ.update(main.COMET_DEFAULTS)

import comet_ml  # noqa: F401
