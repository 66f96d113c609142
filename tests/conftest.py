"""What every test runs with: few threads, no network, one Hypothesis profile."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.shared_folder import shared_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.shared_folder import SharedFolder

# Read by the libraries when they are imported, so set before any test imports them. One of several test processes
# leaves the other cores to its siblings.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for a core make a busy machine crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TQDM_DISABLE", "1")  # for tests of what stderr says

# Started in the background of a script, pytest ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# PyTorch's own number in every test, of which bits depend
THREADS = int(os.environ["OMP_NUM_THREADS"])

# A busy machine is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """What all test processes share."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def _traces_are_remembered(shared: SharedFolder) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:  # tests that do without it need not wait for it
            from tests.remembered_traces import remember_traces

            remember_traces(patch, shared)
        yield
