"""The demo at small sizes: what it leaves, and that a second start makes nothing anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Run

SMALL = (
    "dataset.prompts=4",
    "dataset.points_per_prompt=20",
    "sampling.steps=20",
    "training.iterations=3",
    "training.batch=4",
    "validation.pictures=4",
    "validation.latents=8",
)


@pytest.mark.slow
def test_demo(run: Run, tmp_path: Path) -> None:
    command = ["demo", "--out", tmp_path / "demo", *(part for value in SMALL for part in ("--set", value)), "--json"]
    first = run(*command)
    assert first.code in {0, 3}, first.err
    assert ("error" in first.data) == (first.code == 3)
    backends = {row["engine"].split(",")[1].split()[0] for row in first.data["engines"]}
    assert {"openvino", "onnxruntime"} <= backends
    measured = [row for row in first.data["engines"] if row["accuracy"] is not None]
    assert all(row["milliseconds_per_step"] > 0 and row["bytes"] > 0 for row in measured)
    assert measured[0]["psnr_ddim_20"] is not None
    out = tmp_path / "demo"
    for name in ("report.html", "report.json", "summary.json", "picture.png"):
        assert (out / name).stat().st_size > 0
    assert json.loads((out / "summary.json").read_text()) == {k: v for k, v in first.data.items() if k != "error"}
    manifests = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    second = run(*command)
    assert second.code == first.code
    assert {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")} == manifests
    assert second.data["median_psnr"] == first.data["median_psnr"]
