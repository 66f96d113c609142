"""SIGKILL at any moment of a whole calibration: the second start ends at the bytes of one that was not killed."""

from __future__ import annotations

import json
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

# argv: pipeline, recipe as JSON, prompts as JSON, folder, number of kills. Every kill is of a process of its own, at a
# random share of the processor time that an undisturbed calibration takes.
KILLED = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from s2p_deploy.calib import calibrate
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Prompt, PromptSet

torch.set_num_threads(1)  # and none to lose in a fork
base = resolve_base(sys.argv[1])
recipe = recipe_from_data(json.loads(sys.argv[2]), "test")
prompts = PromptSet(tuple(Prompt(*pair) for pair in json.loads(sys.argv[3])))

def started(out):
    child = os.fork()
    if child == 0:
        calibrate(base, recipe, prompts, out)
        os._exit(0)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def spent(child):
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return "Z" if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

def wait_until_spent(child, seconds):
    while (now := spent(child)) != "Z" and now < seconds:
        time.sleep(0.001)

assert ended(started(Path(sys.argv[4]) / "timed")) == 0
used = resource.getrusage(resource.RUSAGE_CHILDREN)
moments, codes = random.Random(0), []
for number in range(int(sys.argv[5])):
    out = Path(sys.argv[4]) / str(number)
    child = started(out)
    wait_until_spent(child, moments.random() * (used.ru_utime + used.ru_stime))
    os.kill(child, signal.SIGKILL)
    codes.append(ended(child))
    assert ended(started(out)) == 0
print(json.dumps(codes))
"""


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
    assert json.loads(run.stdout).count(-9) >= kills / 2
    for out in (tmp_path / "timed", *(tmp_path / str(number) for number in range(kills))):
        assert file_bytes(out) == file_bytes(expected.folder)
        assert not out.with_name(f"{out.name}.partial").exists()
