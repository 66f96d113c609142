"""What takes long to make is made once for all processes of a test run, in a folder that they share."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest


@dataclass(frozen=True)
class SharedFolder:
    """Keeps things by name. They are not to be changed: a test that spoils one copies it first."""

    folder: Path

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The thing ``name``, made by the first process that asks for it; the others wait.

        ``make`` is given a path in a folder of its own, and writes a file or a folder there. One that fails leaves
        nothing, and the next to ask makes it.
        """
        kept = self.folder / name
        kept.mkdir(parents=True, exist_ok=True)
        with (kept / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back at the end, also of a process that dies
            if not (kept / "whole").exists():
                shutil.rmtree(kept / "made", ignore_errors=True)
                (kept / "made").mkdir()
                make(kept / "made" / name)
                (kept / "whole").touch()
        return kept / "made" / name


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """Of this run: a worker's temporary folder lies in that of the run."""
    own = tmp_path_factory.getbasetemp()
    return SharedFolder((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared")
