"""A child that crashes, hangs or eats memory ends as an error; the parent goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Protocol

import pytest

from s2p_deploy.child_process import ChildEndedError, ChildProcess, Ended, Limits, running
from s2p_deploy.engines.backend import call_in_child
from s2p_deploy.errors import EngineBuildError, InputError, S2PError

PREAMBLE = "import pathlib, sys\nfrom s2p_deploy.errors import InputError\ndef work(request):\n"
GIB = 2**30


class RunSource(Protocol):
    def __call__(self, source: str, limits: Limits | None = None, **request: str | int) -> dict[str, Any]: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSource:
    """Calls a function whose body is the given source in a child."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules))

    def run_source(source: str, limits: Limits | None = None, **request: str | int) -> dict[str, Any]:
        body = "".join(f"    {line}\n" for line in source.splitlines())
        (modules / "child_under_test.py").write_text(PREAMBLE + body, encoding="utf-8")
        return call_in_child("child_under_test:work", request, limits or Limits(30))

    return run_source


def test_the_answer_comes_back(run: RunSource) -> None:
    assert run("return {'twice': 2 * request['number']}", number=21) == {"twice": 42}


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
    greedy = "kept = [bytearray(64 << 20) for _ in range(64)]\nreturn {}"
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


def test_a_child_that_ends_without_a_reply_failed(run: RunSource) -> None:
    with pytest.raises(EngineBuildError, match="exit code 0, no output"):
        run("import os\nos._exit(0)")


def test_an_expected_error_keeps_its_class(run: RunSource) -> None:
    with pytest.raises(InputError, match="wrong graph"):
        run("raise InputError('wrong graph')")


def test_an_expected_error_of_an_unknown_class_is_still_expected(run: RunSource) -> None:
    with pytest.raises(S2PError, match="odd"):
        run("class Other(InputError): pass\nraise Other('odd')")


def test_the_working_directory_shadows_no_library(
    run: RunSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run("return {'fine': True}") == {"fine": True}


def test_what_a_library_prints_is_no_reply(run: RunSource) -> None:
    assert run("import os\nprint('{}')\nos.write(1, b'{}')\nreturn {'fine': True}") == {"fine": True}


def test_a_child_answers_until_it_is_closed() -> None:
    with ChildProcess(running("operator:itemgetter"), Limits(60)) as child, pytest.raises(ChildEndedError):
        child.request({})  # no function of a message to a result
    source = "from s2p_deploy.child_process import serve\nserve(lambda message: {'twice': 2 * message['number']})"
    with ChildProcess(("-c", source), Limits(60)) as child:
        assert [child.request({"number": number})["twice"] for number in range(3)] == [0, 2, 4]


SKIPPED = "[W] Skipping tactic 0x3 due to insufficient memory: out of memory\n"


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (Ended(1, f"{SKIPPED}Traceback ...\n", "ValueError: no such tactic"), "failed: ValueError: no such tactic"),
        (
            Ended(1, f"[E] OutOfMemory (requested 8 GiB)\n{SKIPPED}[E] CHECK(dtype) failed\n", "E: Invalid Engine"),
            "failed: [E] CHECK(dtype) failed",
        ),
        (Ended(-11, f"{SKIPPED}one\ntwo\nthree\n"), "crashed with SIGSEGV"),
        (Ended(1, "", "MemoryError: "), "ran out of memory"),
        (Ended(1, "[E] CHECK failed\n", "RuntimeError: std::bad_alloc"), "ran out of memory"),
        (Ended(1, "[E] Error Code 2: OutOfMemory (requested 8 GiB)\n", "E: Invalid Engine"), "ran out of memory"),
        (
            Ended(1, "OpenBLAS error: Memory allocation still failed after 10 retries, giving up.\n"),
            "ran out of memory",
        ),
        (
            Ended(1, "", "ImportError: libscipy_openblas.so: failed to map segment from shared object"),
            "ran out of memory",
        ),
        (
            Ended(-6, "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"),
            "ran out of memory",
        ),
        (
            Ended(1, "", "OSError: [Errno 28] No space left on device"),
            "ran out of disk, or of the size that a file may have",
        ),
        (Ended(-9, ""), "was killed, most likely because memory ran out"),
    ],
)
def test_only_the_final_error_says_what_a_child_died_of(ended: Ended, said: str) -> None:
    """A library that skips an algorithm for want of memory, and then fails of something else, hid the fault once."""
    assert ended.summary(Limits()) == said
