"""What every test runs with: few threads, no network, one Hypothesis profile."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

# one of several test processes leaves the other cores to its siblings
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

# Read by the libraries when they are imported, so set before any test imports them.
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for a core make a busy machine crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TQDM_DISABLE", "1")  # for tests of what stderr says

# A busy machine is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)
