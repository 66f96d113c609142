"""SIGKILL at any moment of a validation: the second start ends at the report of one that was not killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2p_deploy.calib.request import stored_request
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import Prompt, PromptSet, ValidationReport
from s2p_deploy.records.files import claimed
from s2p_deploy.validation import Chain, validate
from s2p_deploy.validation.pictures import BATCH

# argv: engine, folder of the report, number of prompts. Prints a line per part of the stage as it is finished.
CHILD = """
import sys
from pathlib import Path
import torch
from s2p_deploy.context import Context
from s2p_deploy.records import Engine, Prompt, PromptSet
from s2p_deploy.validation import validate

torch.set_num_threads(1)
prompts = PromptSet(tuple(Prompt(f"p{i}", f"a word {i}") for i in range(int(sys.argv[3]))))
engine = Engine.open(Path(sys.argv[1]))
def told(stage, done, total):
    print(stage, done, total, flush=True)
validate(engine, prompts, Path(sys.argv[2]), pictures=len(prompts.prompts), context=Context(progress=told))
"""
COUNT = BATCH + 3


@pytest.fixture
def many() -> PromptSet:
    return PromptSet(tuple(Prompt(f"p{i}", f"a word {i}") for i in range(COUNT)))


def killed_after(line: str, chain: Chain, out: Path) -> None:
    """Starts a validation and kills it as soon as it says ``line``."""
    command = [sys.executable, "-c", CHILD, str(chain.engine.folder), str(out), str(COUNT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TQDM_DISABLE": "1"}) as child:
        assert child.stdout is not None
        assert any(said.startswith(line) for said in child.stdout), line
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def untimed(data: dict[str, Any]) -> dict[str, Any]:
    """A report's data without wall times."""
    same = json.loads(json.dumps(data))
    del same["spent"], same["pictures"]["seconds_per_picture"]
    return dict(same)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(f"pictures, FP {BATCH} ", marks=pytest.mark.slow),
        pytest.param("codes 16 ", marks=pytest.mark.slow),
        pytest.param(f"pictures, engine {BATCH} ", marks=pytest.mark.slow),
    ],
)
def test_a_killed_validation_goes_on_to_the_same_report(
    chain: Chain, many: PromptSet, moment: str, tmp_path: Path, whole: ValidationReport
) -> None:
    out = tmp_path / "report"
    killed_after(moment, chain, out)
    kept = {path.name for path in (tmp_path / "report.partial").iterdir()}
    assert "pictures-FP-00000.safetensors" in kept
    assert not out.exists()
    said: list[str] = []
    torch.set_num_threads(1)
    context = Context(progress=lambda stage, done, _total: said.append(f"{stage} {done}"))
    report = validate(chain, many, out, pictures=COUNT, context=context)
    assert f"pictures, FP {BATCH}" not in said, "it was drawn before"
    assert not (tmp_path / "report.partial").exists()
    assert untimed(report.data) == untimed(whole.data)
    for name in whole.manifest.files:
        if name.startswith("pictures/"):
            assert report.manifest.files[name] == whole.manifest.files[name]
    assert report.data["spent"]["starts"] == 2
    assert report.data["spent"]["seconds"] > sum(report.data["pictures"]["seconds_per_picture"].values()) * COUNT


@pytest.fixture(scope="module")
def whole(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> ValidationReport:
    """The report of a validation that was not killed."""
    torch.set_num_threads(1)
    prompts = PromptSet(tuple(Prompt(f"p{i}", f"a word {i}") for i in range(COUNT)))
    report = validate(chain, prompts, tmp_path_factory.mktemp("whole") / "report", pictures=COUNT)
    assert report.data["spent"]["starts"] == 1
    return report


@pytest.fixture
def left(chain: Chain, prompts: PromptSet, tmp_path: Path) -> Path:
    """Where a report will stand, beside the unfinished work of an interrupted validation of ``prompts``."""

    def interrupt(stage: str, _done: int, _total: int) -> None:
        if stage == "pictures, FP":
            raise KeyboardInterrupt

    out = tmp_path / "report"
    with pytest.raises(KeyboardInterrupt):
        validate(chain, prompts, out, pictures=2, context=Context(progress=interrupt))
    assert stored_request(tmp_path / "report.partial")["engine"] == chain.engine.manifest.digest
    return out


def test_another_validation_does_not_go_on_there(chain: Chain, prompts: PromptSet, left: Path) -> None:
    with pytest.raises(InputError, match="unfinished work with another prompts"):
        validate(chain, prompts, left, pictures=3)
    other = chain.recipe.validation.model_copy(update={"latents": 8})
    with pytest.raises(InputError, match="unfinished work with another latents"):
        validate(
            replace(chain, recipe=chain.recipe.model_copy(update={"validation": other})), prompts, left, pictures=2
        )
    assert not left.exists()
    report = validate(chain, prompts, left, pictures=1, replace=True)
    assert report.data["pictures"]["n"] == 1


def test_one_process_at_a_time(chain: Chain, prompts: PromptSet, left: Path) -> None:
    with claimed(left.with_name("report.partial")), pytest.raises(InputError, match="another process is at work"):
        validate(chain, prompts, left, pictures=2)


def test_what_was_kept_and_changed_is_refused(chain: Chain, prompts: PromptSet, left: Path) -> None:
    part = left.with_name("report.partial") / "pictures-FP-00000.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(IntegrityError, match=r"FP-00000\.safetensors is damaged"):
        validate(chain, prompts, left, pictures=2)
