"""Runs tests/placement on the pretended device, which changes PyTorch for the whole of its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from s2p_deploy.recipe import preset_names

ROOT = Path(__file__).resolve().parents[1]


def run(**chosen: str) -> subprocess.CompletedProcess[str]:
    """The checks in a process of their own, of the recipes and options that are ``chosen``."""
    checks = ["tests/placement/checks.py", "-q", "-p", "no:randomly", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = os.environ | chosen | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *checks],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


def test_every_stage_runs_on_a_device_that_is_no_cpu() -> None:
    ended = run()
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]


@pytest.mark.slow
def test_every_recipe_and_option_calibrates_on_a_device_that_is_no_cpu() -> None:
    streamed = {"ptq-stream", "fp"}  # they compute nothing
    recipes = [name for name in preset_names() if name not in {"w4a8", *streamed}]
    options = "adapters,features,freezing,checkpointing"
    ended = run(PLACEMENT_RECIPES=",".join(recipes), PLACEMENT_OPTIONS=options)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
