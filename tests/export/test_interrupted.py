"""An export that ends in the middle, killed or on a full disk: the old one stays, and nothing half-written does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.records import CalibratedModel, ExportedGraph

# argv: calibrated model, where to. Kills itself while weights are written.
KILLED = """
import os, signal, sys
from pathlib import Path
from s2p_deploy.export import export_graph
from s2p_deploy.records import CalibratedModel

def stop(stage, done, total):
    if stage == "write weights" and done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

export_graph(CalibratedModel.open(Path(sys.argv[1])), Path(sys.argv[2]), replace=True, progress=stop)
"""

# argv: bytes that a file may have, then the command line. As where a disk has so much room left.
LITTLE_ROOM = """
import resource, sys
from s2p_deploy.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


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


def test_a_disk_that_fills_up_meanwhile_is_one_line(w8a8: CalibratedModel, tmp_path: Path) -> None:
    found = run(LITTLE_ROOM, 20_000, "export", w8a8.folder, "--out", tmp_path / "graph")
    assert found.returncode == 2
    assert "denoiser.onnx cannot be written (" in found.stderr
    assert "): make room, or choose another --out" in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    w8a8: CalibratedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2p_deploy.records.disk_room.free_bytes", lambda _: 1000)
    with pytest.raises(InputError, match=r"graph needs .* GB and its disk has 1e-06 GB left: make room"):
        export_graph(w8a8, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []
