"""What every test runs with: few threads, no network, one Hypothesis profile."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.shared_folder import shared_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

    from tests.shared_folder import SharedFolder

# Read by the libraries when they are imported, so set before any test imports them. One of several test processes
# leaves the other cores to its siblings.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for a core make a busy machine crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TQDM_DISABLE", "1")  # for tests of what stderr says
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")  # without a GPU, on the CPU

# Started in the background of a script, pytest ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# PyTorch's own number in every test, of which bits depend
THREADS = int(os.environ["OMP_NUM_THREADS"])

# A busy machine is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


# Files of few long tests. Begun first, none keeps one process busy after the others have ended; by their number of
# tests, which is xdist's own order, they would come last.
LONG_FILES = ("test_placement.py", "test_calibrate_kills.py", "test_dynamic_sizes.py", "test_family_pipelines.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Gives every test the same number of threads, before fixtures of any scope: bits depend on it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """What all test processes share."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def _cache_is_the_tests_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S2P_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _traces_are_remembered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:  # tests that do without it need not wait for it
            from tests.remembered_traces import kept_traces, remember_traces

            remember_traces(patch, kept_traces())
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, which ``make browser`` installs; without it CI fails and others skip."""
    from tests.browser import installed_browser, started_browser

    program = installed_browser()
    if program is None:
        without = pytest.fail if os.environ.get("CI") else pytest.skip
        without("no Chromium here: `make browser` installs it, or says how")
    with started_browser(program) as browser:
        yield browser
