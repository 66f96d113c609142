from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.records.lock import claimed, is_claimed, lock_file

# As a claim does, without the package's long way of imports.
HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_claim_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.partial"
    with claimed(path):
        assert is_claimed(path)
        with pytest.raises(InputError, match=r"another process is at work on .*model\.partial: let") as caught:
            claimed(path).__enter__()
        assert "\n" not in str(caught.value)
        assert is_claimed(path)


def test_a_claim_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path / "x"):
        raise KeyError
    assert not is_claimed(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "x"):
        pass


def test_a_claim_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "x"
    command = [sys.executable, "-c", HOLD, str(lock_file(path))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InputError), claimed(path):
        pass
    process.kill()
    process.communicate()
    assert lock_file(path).exists()
    with claimed(path):
        pass
    assert list(tmp_path.iterdir()) == []
