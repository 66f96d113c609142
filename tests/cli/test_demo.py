"""The demo at small sizes: what it leaves, that Ctrl-C loses little, and that a second start makes nothing anew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import Run

SMALL = (
    "dataset.prompts=4",
    "dataset.samples_per_prompt=20",
    "sampling.steps=20",
    "training.iterations=3",
    "training.batch=4",
    "validation.pictures=4",
    "validation.latents=8",
)


def interrupted(command: list[str], when: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which gets Ctrl-C when a file is there."""
    program = "import sys; from s2p_deploy.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not when.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.slow
def test_demo(run: Run, tmp_path: Path) -> None:
    settings = (part for value in SMALL for part in ("--set", value))
    command = ["demo", "--out", tmp_path / "demo", "--threads", 1, *settings, "--json"]
    ended = interrupted(
        [str(part) for part in command], tmp_path / "demo" / "w4a8" / "calib.partial" / "training.jsonl"
    )
    assert ended.returncode == 130, ended.stderr
    assert json.loads(ended.stdout)["error"]["exit_code"] == 130
    assert ended.stderr.splitlines()[-1].startswith("s2p-deploy: interrupted")
    assert "Traceback" not in ended.stderr
    (dataset,) = (tmp_path / "demo" / "datasets").glob("*/manifest.json")
    made = dataset.stat().st_mtime_ns
    first = run(*command)
    assert dataset.stat().st_mtime_ns == made
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
