"""SIGKILL at any moment of a whole calibration: the second start ends at the bytes of one that was not killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from s2p_deploy.calib import calibrate
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet
from tests.kill_loop import kill_script

KILLED = kill_script(
    imports="from s2p_deploy.calib import calibrate", setup="", work="calibrate(base, recipe, prompts, out)"
)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_calibration_killed_at_any_moment_goes_on_to_the_same_bytes(
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    file_bytes: Callable[[Path], dict[str, bytes]],
    kills: int,
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    expected = calibrate(base, recipe, prompts, tmp_path / "whole")
    texts = json.dumps([[prompt.id, prompt.text] for prompt in prompts.prompts])
    arguments = [str(base.folder), recipe.model_dump_json(), texts, str(tmp_path), str(kills)]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    codes = json.loads(run.stdout)
    assert codes.count(-signal.SIGKILL) == kills
    for out in (tmp_path / str(number) for number in range(1 + len(codes))):
        assert file_bytes(out) == file_bytes(expected.folder)
        assert not out.with_name(f"{out.name}.partial").exists()
