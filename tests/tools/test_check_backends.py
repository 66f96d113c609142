"""Children that really crash, hang and eat memory each give their verdict, and cost only the pattern they were at."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.child_process import Limits
from s2p_deploy.engines.backend import backend_by_name
from s2p_deploy.engines.support import TABLE, Pattern, support_of
from s2p_deploy.errors import EngineBuildError, InputError
from s2p_deploy.records import Execution
from tools.check_backends import check_backend, fastest_execution, table_text

MISBEHAVING = """
import ctypes, sys, time
sys.path.insert(0, {root!r})
from s2p_deploy.child_process import serve
from tools.check_backends import Outcome, attempt_in_child

def attempt(backend, pattern, dtype, execution):
    match pattern.weights:
        case "crash":
            print("last words", flush=True)
            ctypes.string_at(0)
        case "hang":
            time.sleep(600)
        case "memory":
            kept = [bytearray(64 << 20) for _ in range(100)]
        case "abort":
            ctypes.CDLL(None).abort()
        case "error":
            print("[E] IBuilder: CHECK(dtype) failed", flush=True)
            raise RuntimeError("Invalid engine")
        case "wrong":
            return Outcome("wrong", "results are off", "int8")
    return Outcome("builds", compute="int8")

serve(lambda message: attempt_in_child(message, attempt))
"""
ROOT = str(Path(__file__).resolve().parents[2])
LIMITS = Limits(20, 3 * 2**30)


def pattern(weights: str) -> Pattern:
    return Pattern("rescale", "conv", weights, "int8")


@pytest.mark.slow
def test_every_end_has_its_verdict() -> None:
    weights = ("fine", "crash", "hang", "memory", "abort", "error", "wrong", "last")
    reported: list[int] = []
    table = check_backend(
        "onnxruntime",
        patterns=tuple(map(pattern, weights)),
        worker=("-c", MISBEHAVING.format(root=ROOT)),
        limits=LIMITS,
        progress=lambda _stage, done, _total: reported.append(done),
    )
    assert [(f.pattern.weights, f.verdict) for f in table.findings if f.dtype == "fp32"] == [
        ("fine", "builds"),
        ("crash", "crashes"),
        ("memory", "fails"),
        ("abort", "crashes"),
        ("error", "fails"),
        ("wrong", "wrong"),
        ("last", "builds"),
    ]
    details = {f.pattern.weights: f.detail for f in table.findings}
    assert details["crash"] == "crashed with SIGSEGV"
    assert "hang" not in details  # a slow machine is no verdict
    assert "MemoryError" in details["memory"] or "memory" in details["memory"]
    assert details["abort"] == "crashed with SIGABRT"
    assert details["error"] == "[E] IBuilder: CHECK(dtype) failed"
    assert [f.dtype for f in table.findings] == ["fp32"] * 7 + ["fp16"] * 7
    assert reported[0] == 0
    assert reported == sorted(reported)
    assert reported[-1] == 16


def test_a_child_that_cannot_start_is_no_verdict() -> None:
    with pytest.raises(EngineBuildError, match=r"could not start(.*\n)*.*no_such_library"):
        check_backend("onnxruntime", patterns=(pattern("int8"),), worker=("-c", "import no_such_library"))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(InputError):
        check_backend("nonsense")


def test_the_execution_is_the_fastest_on_the_default_provider() -> None:
    assert fastest_execution(backend_by_name("onnxruntime")) == Execution(None, "cpu", "full")


@pytest.mark.slow
def test_what_ships_of_onnxruntime_is_what_the_check_finds() -> None:
    patterns = (Pattern("rescale", "conv", "int8", "int8"), Pattern("runtime_q", "matmul", "int4", "int8"))
    table = check_backend("onnxruntime", patterns=patterns)
    assert TABLE.validate_json(table_text(table)) == table
    assert set(table.findings) <= set(support_of("onnxruntime").findings)


@pytest.mark.trt
@pytest.mark.slow
def test_a_runtime_scale_behind_a_conv_really_crashes_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    patterns = (Pattern("dq_runtime", "conv", "int8", "int8"), Pattern("rescale", "conv", "int8", "int8"))
    table = check_backend("tensorrt_rtx", patterns=patterns)
    assert [(f.verdict, f.detail) for f in table.findings] == [("crashes", "crashed with SIGSEGV"), ("builds", "")]
