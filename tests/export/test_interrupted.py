"""An export that ends in the middle, killed or on a full disk: the old one stays, and nothing half-written does."""

from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s2p_deploy.cli import main
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.records import CalibratedModel, ExportedGraph

if TYPE_CHECKING:
    from collections.abc import Iterator

# argv: calibrated model, where to. Kills itself while weights are written.
KILLED = """
import os, signal, sys
from pathlib import Path
from s2p_deploy.context import Context
from s2p_deploy.export import export_graph
from s2p_deploy.records import CalibratedModel

def stop(stage, done, total):
    if stage == "write weights" and done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

export_graph(CalibratedModel.open(Path(sys.argv[1])), Path(sys.argv[2]), replace=True, context=Context(progress=stop))
"""


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As where a disk has so many bytes of room left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_a_kill_leaves_the_old_graph_and_the_next_export_gives_the_same_bytes(
    w8a8: CalibratedModel, w8a8_graph: ExportedGraph, tmp_path: Path
) -> None:
    out = tmp_path / "graph"
    export_graph(w8a8, out, dtype="fp16")
    before = files(out)
    assert run(KILLED, w8a8.folder, out).returncode == -9
    assert (tmp_path / ".graph.writing").is_dir(), "the kill must hit it in the middle"
    assert files(out) == before
    again = export_graph(w8a8, out, replace=True)
    assert again.manifest.files == w8a8_graph.manifest.files
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@pytest.mark.usefixtures("w8a8_graph")  # its trace is remembered: to write it takes more room
def test_a_disk_that_fills_up_meanwhile_is_one_line(
    w8a8: CalibratedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with files_of_at_most(20_000):
        assert main(["export", str(w8a8.folder), "--out", str(tmp_path / "graph")]) == 2
    found = capsys.readouterr().err
    assert "denoiser.onnx cannot be written (" in found
    assert "): make room, or choose another --out" in found
    assert "Traceback" not in found
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    w8a8: CalibratedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2p_deploy.records.files.free_bytes", lambda _: 1000)
    with pytest.raises(InputError, match=r"graph needs .* GB and its disk has 1e-06 GB left: make room"):
        export_graph(w8a8, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []
