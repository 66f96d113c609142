"""``bench`` on the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import Run
from tests.named_engines import NamedEngines

COMMAND = [sys.executable, "-c", "import sys; from s2p_deploy.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> NamedEngines:
    return NamedEngines(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def engine(engine_of: NamedEngines) -> Path:
    return engine_of("w8a8", "full").folder


@pytest.fixture(scope="module")
def baseline(engine_of: NamedEngines) -> Path:
    return engine_of("fp", "full").folder


def test_one_object_on_stdout(run: Run, engine: Path, baseline: Path) -> None:
    done = run("bench", engine, "--against", baseline, "--rounds", 2, "--pictures", 0, "--json")
    assert done.code == 0, done.err
    assert done.data["kind"] == "Bench"
    assert done.data["engines"][0]["ratios"]["step"]["n"] == 6
    assert "measure steps 4/4" in done.err


def test_a_table_for_people(run: Run, engine: Path, baseline: Path) -> None:
    done = run("bench", engine, engine, "--against", baseline, "--rounds", 1, "--pictures", 0)
    assert done.code == 0, done.err
    assert all(
        word in done.out
        for word in ("Against floating point", "step p50", "precision f32, provider cpu, optimization full", "fp-full")
    )
    assert done.out.count(" w8a8-full ") == 2


@pytest.mark.parametrize(("option", "value"), [("--rounds", 0), ("--batch", 0), ("--pictures", -1)])
def test_numbers_have_bounds(run: Run, engine: Path, baseline: Path, option: str, value: int) -> None:
    done = run("bench", engine, "--against", baseline, option, value)
    assert (done.code, done.out) == (2, "")
    assert option in done.err


def test_a_baseline_that_does_not_fit_is_one_line(run: Run, engine: Path) -> None:
    done = run("bench", engine, "--against", engine)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert "give an engine of recipe fp" in done.err


def test_pictures_need_the_pipeline(run: Run, engine: Path, baseline: Path) -> None:
    done = run("bench", engine, "--against", baseline, "--model", "shapes")
    assert (done.code, done.out) == (5, "")
    assert "not the pipeline" in done.err


@pytest.mark.slow
def test_ctrl_c_ends_every_process(engine: Path, baseline: Path) -> None:
    options = ["--against", str(baseline), "--rounds", "1000000", "--pictures", "0"]
    process = subprocess.Popen(
        [*COMMAND, "bench", str(engine), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        seen = ""
        while "load 2/2" not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        held = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        assert len(held) == 2
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, rest
    assert stdout == ""
    assert "Traceback" not in rest
    assert [pid for pid in held if os.path.exists(f"/proc/{pid}")] == []  # noqa: PTH110 - a process, not a file


def test_an_engine_that_gains_too_little_ends_with_exit_code_3(run: Run, engine: Path, baseline: Path) -> None:
    options = ("--against", baseline, "--rounds", 2, "--pictures", 0)
    done = run("bench", engine, *options, "--speedup", 1000, "--json")
    assert done.code == 3
    assert "no gain here, do not deploy: w8a8-full: speedup is" in done.err
    assert done.data["engines"][0]["gates"][0]["limit"] == 1000
    done = run("bench", engine, *options, "--speedup", 0.01)
    assert done.code == 0, done.err
    assert "passed" in done.out
