"""Tests; `tests.conftest` says how they run."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported; others wait for work in a loop
