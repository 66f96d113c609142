"""A child that crashes, hangs or eats memory ends as an error; the parent goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Protocol

import pytest

from s2p_deploy.engines.isolation import Limits, run_child
from s2p_deploy.errors import EngineBuildError, InputError

PREAMBLE = "import json, pathlib, sys\nrequest = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
ANSWER = "pathlib.Path(sys.argv[2]).write_text(json.dumps({}))\n"
GIB = 2**30


class RunSource(Protocol):
    def __call__(self, source: str, limits: Limits | None = None, **request: str | int) -> dict[str, Any]: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSource:
    """Runs a module of the given source as a child."""
    modules, scratch = tmp_path / "modules", tmp_path / "scratch"
    modules.mkdir()
    scratch.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules))

    def run_source(source: str, limits: Limits | None = None, **request: str | int) -> dict[str, Any]:
        (modules / "child_under_test.py").write_text(PREAMBLE + source, encoding="utf-8")
        return run_child("child_under_test", request, scratch, limits or Limits(30))

    return run_source


def test_the_answer_comes_back(run: RunSource) -> None:
    assert run(ANSWER.format("{'twice': 2 * request['number']}"), number=21) == {"twice": 42}


def test_a_native_crash_names_its_signal_and_keeps_the_log(run: RunSource) -> None:
    crash = "print('last words', flush=True)\nimport ctypes\nctypes.string_at(0)\n"
    with pytest.raises(EngineBuildError, match="SIGSEGV") as caught:
        run(crash)
    first, *tail = str(caught.value).splitlines()
    assert first == "the build crashed with SIGSEGV"
    assert "last words" in tail


def test_a_hanging_child_is_stopped_with_all_that_it_started(run: RunSource, tmp_path: Path) -> None:
    source = (
        "import os, subprocess, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(request['pid']).write_text(str(other.pid))\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    with pytest.raises(EngineBuildError, match="did not finish in 4 s"):
        run(source, Limits(4), pid=str(tmp_path / "pid"))
    assert time.monotonic() - started < 30
    assert ends(int((tmp_path / "pid").read_text()), within_s=10)


def ends(pid: int, within_s: float) -> bool:
    """Whether a process is gone within a time: a kill is delivered when the machine gets to it."""
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is killed and not yet collected does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_memory_beyond_the_limit_is_refused(run: RunSource) -> None:
    greedy = "kept = [bytearray(64 << 20) for _ in range(64)]\n" + ANSWER.format("{}")
    with pytest.raises(EngineBuildError, match=r"ran out of memory \(limit 0\.50 GiB\)"):
        run(greedy, Limits(30, GIB // 2))


def test_a_killed_child_is_told_from_a_crash(run: RunSource) -> None:
    with pytest.raises(EngineBuildError, match="killed, most likely because memory ran out"):
        run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")


def test_an_exception_is_the_summary(run: RunSource) -> None:
    with pytest.raises(EngineBuildError, match=r"\Athe build failed: ValueError: no such tactic\n"):
        run("raise ValueError('no such tactic')\n")


def test_a_native_librarys_error_line_goes_before_pythons(run: RunSource) -> None:
    source = "print('[E] IBuilder: CHECK failed', flush=True)\nraise RuntimeError('Invalid Engine')\n"
    with pytest.raises(EngineBuildError, match=r"\Athe build failed: \[E\] IBuilder: CHECK failed\n"):
        run(source)


def test_a_child_without_an_answer_failed(run: RunSource) -> None:
    with pytest.raises(EngineBuildError, match="exit code 0, no output"):
        run("")


def test_an_expected_error_keeps_its_class(run: RunSource) -> None:
    with pytest.raises(InputError, match="wrong graph"):
        run(ANSWER.format("{'error': 'InputError', 'message': 'wrong graph'}"))


@pytest.mark.parametrize("name", ["SystemExit", "annotations", "nonsense"])
def test_an_error_of_another_name_is_a_build_error(run: RunSource, name: str) -> None:
    with pytest.raises(EngineBuildError):
        run(ANSWER.format(f"{{'error': '{name}', 'message': 'odd'}}"))


def test_the_working_directory_shadows_no_library(
    run: RunSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(ANSWER.format("{'fine': True}")) == {"fine": True}
