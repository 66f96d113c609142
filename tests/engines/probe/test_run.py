"""Children that really crash, hang and eat memory each give their verdict, and cost only the pattern they were at."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.engines.backend import backend_by_name
from s2p_deploy.engines.isolation import Limits
from s2p_deploy.engines.probe.run import ensure_probed, fastest_hint, probe_backend
from s2p_deploy.engines.support import Finding, Pattern, support_of
from s2p_deploy.engines.support_tables import find_table, key_of
from s2p_deploy.errors import EngineBuildError, InputError

MISBEHAVING = """
import ctypes, json, pathlib, sys, time
from s2p_deploy.engines.probe.worker import Outcome, work

def attempt(backend, pattern, dtype, hint):
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

work(json.loads(pathlib.Path(sys.argv[1]).read_text()), attempt)
pathlib.Path(sys.argv[2]).write_text("{}")
"""
LIMITS = Limits(20, 3 * 2**30)


def pattern(weights: str) -> Pattern:
    return Pattern("rescale", "conv", weights, "int8")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules children can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_every_end_has_its_verdict(modules: Path) -> None:
    (modules / "misbehaving.py").write_text(MISBEHAVING, encoding="utf-8")
    asked = ("fine", "crash", "hang", "memory", "abort", "error", "wrong", "last")
    told: list[int] = []
    table = probe_backend(
        "onnxruntime",
        patterns=tuple(map(pattern, asked)),
        worker="misbehaving",
        limits=LIMITS,
        progress=lambda _stage, done, _total: told.append(done),
    )
    assert [(f.pattern.weights, f.verdict) for f in table.findings if f.dtype == "fp32"] == [
        ("fine", "builds"),
        ("crash", "crashes"),
        ("hang", "fails"),
        ("memory", "fails"),
        ("abort", "crashes"),
        ("error", "fails"),
        ("wrong", "wrong"),
        ("last", "builds"),
    ]
    details = {f.pattern.weights: f.detail for f in table.findings}
    assert details["crash"] == "crashed with SIGSEGV"
    assert details["hang"] == "did not finish in 20 s and was stopped"
    assert "MemoryError" in details["memory"] or "memory" in details["memory"]
    assert details["abort"] == "crashed with SIGABRT"
    assert details["error"] == "[E] IBuilder: CHECK(dtype) failed"
    assert [f.dtype for f in table.findings] == ["fp32"] * 8 + ["fp16"] * 8
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] == 16


def test_a_child_that_cannot_start_is_no_verdict(modules: Path) -> None:
    (modules / "broken.py").write_text("import no_such_library\n", encoding="utf-8")
    with pytest.raises(EngineBuildError, match=r"could not start.*no_such_library"):
        probe_backend("onnxruntime", patterns=(pattern("int8"),), worker="broken")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(InputError):
        probe_backend("nonsense")


def test_the_hint_computes_where_the_default_does() -> None:
    assert fastest_hint(backend_by_name("onnxruntime")) == "fast"


@pytest.mark.slow
def test_a_version_without_a_table_is_probed_once(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2p_deploy.engines.support_tables.shipped_folder", lambda: modules / "nothing shipped")
    assert support_of("onnxruntime").verdicts == {}
    told: list[str] = []
    ensure_probed("onnxruntime", lambda stage, _done, _total: told.append(stage))
    assert set(told) == {"probe onnxruntime"}
    support = support_of("onnxruntime")
    assert support.takes(Pattern("rescale", "conv", "int8", "int8"))
    assert support.takes(Pattern("runtime_q", "matmul", "int4", "int8"))
    told.clear()
    ensure_probed("onnxruntime", lambda stage, _done, _total: told.append(stage))
    assert told == []
    table = find_table(key_of("onnxruntime"))
    assert table is not None
    assert all(isinstance(finding, Finding) and finding.verdict == "builds" for finding in table.findings)


@pytest.mark.trt
@pytest.mark.slow
def test_a_runtime_scale_behind_a_conv_really_crashes_tensorrt_rtx(modules: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    patterns = (Pattern("dq_runtime", "conv", "int8", "int8"), Pattern("rescale", "conv", "int8", "int8"))
    table = probe_backend("tensorrt_rtx", patterns=patterns)
    assert [(f.verdict, f.detail) for f in table.findings] == [("crashes", "crashed with SIGSEGV"), ("builds", "")]
