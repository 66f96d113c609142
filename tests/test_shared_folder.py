from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared_folder import SharedFolder

ROOT = Path(__file__).resolve().parents[1]

# argv: the folder. Says who made the thing after a while, in which others would make it too.
ASKS = """
import os, sys, time
from pathlib import Path
from tests.shared_folder import SharedFolder

def make(path):
    time.sleep(0.5)
    path.write_text(str(os.getpid()))

print(SharedFolder(Path(sys.argv[1])).made("thing", make).read_text())
"""


def test_a_thing_is_made_once(tmp_path: Path) -> None:
    shared = SharedFolder(tmp_path)
    first = shared.made("thing", lambda path: path.write_text("made"))
    assert first.read_text() == "made"
    assert shared.made("thing", lambda _: pytest.fail("made again")) == first
    assert shared.made("other", lambda path: path.mkdir()).is_dir()


def test_processes_that_ask_at_the_same_time_get_one_thing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ASKS, str(tmp_path)]
    asking = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate()[0] for process in asking}) == 1
    assert all(process.returncode == 0 for process in asking)


def test_what_failed_is_made_anew(tmp_path: Path) -> None:
    shared = SharedFolder(tmp_path)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no more room")

    with pytest.raises(RuntimeError, match="no more room"):
        shared.made("thing", fail)
    assert shared.made("thing", lambda path: path.write_text("whole")).read_text() == "whole"
