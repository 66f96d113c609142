"""The script for the first GPU, rehearsed at small size on the CPU: every step ends with a finding."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks import first_gpu

if TYPE_CHECKING:
    from pathlib import Path

# placement has a test of its own; memory is a GPU's to measure
REHEARSED = ("versions", "calibration", "pictures", "bits", "scales", "walk", "serving", "fused")


@pytest.mark.slow
def test_every_step_ends_with_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "first_gpu.jsonl"
    chosen = [word for step in REHEARSED for word in ("--only", step)]
    options = ["--out", str(out), "--device", "cpu", "--small", "--patience", "20", "--seconds", "3000"]
    monkeypatch.setattr("sys.argv", ["first_gpu", *options, *chosen])
    assert first_gpu.main() == 0, out.read_text(encoding="utf-8")
    lines = {line["step"]: line["found"] for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert set(lines) == set(REHEARSED)
    assert lines["bits"]["plain"] == lines["bits"]["plain"] | {"again_equal": True, "resumed_equal": True}
    assert lines["scales"]["largest_relative_difference"] == 0
    assert lines["serving"]["largest_difference_lsb"] <= 1


@pytest.mark.slow
def test_a_step_that_fails_is_a_line_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "first_gpu.jsonl"
    options = ["--out", str(out), "--device", "cuda:7", "--small", "--only", "versions", "--only", "fused"]
    monkeypatch.setattr("sys.argv", ["first_gpu", *options])
    assert first_gpu.main() == 1
    assert [line["step"] for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())] == [
        "versions",
        "fused",
    ]
    assert "error" in out.read_text(encoding="utf-8")
