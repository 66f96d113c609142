"""What TensorRT keeps between processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.engines.tensorrt import launchers
from s2p_deploy.engines.tensorrt.launchers import read_locked, runtime_cache, timing_cache, write_locked


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_timings_belong_to_a_version_and_a_gpu() -> None:
    given = ("10.13.0", "NVIDIA L4", (8, 9))
    others = [("10.14.0", "NVIDIA L4", (8, 9)), ("10.13.0", "NVIDIA L40S", (8, 9)), ("10.13.0", "NVIDIA L4", (9, 0))]
    paths = {timing_cache(*each) for each in (given, *others)}
    assert len(paths) == 4
    assert timing_cache(*given).name == "timings-10.13.0-NVIDIA_L4-sm89.cache"


def test_compiled_kernels_belong_to_a_plan_a_version_and_a_gpu_generation() -> None:
    names = {runtime_cache(version, sm, plan) for version in "12" for sm in ((8, 9), (12, 0)) for plan in ("a", "b")}
    assert len(names) == 8


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "kernels.bin"
    assert read_locked(file) is None
    assert write_locked(file, b"first")
    assert write_locked(file, b"second")
    assert read_locked(file) == b"second"
    assert {path.name for path in tmp_path.iterdir()} <= {"kernels.bin", "kernels.bin.lock"}


def test_too_large_a_cache_is_neither_written_nor_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kernels.bin"
    write_locked(file, b"12345")
    monkeypatch.setattr(launchers, "LARGEST_RUNTIME_CACHE", 4)
    assert read_locked(file) is None
    assert not write_locked(file, b"67890")
    assert file.read_bytes() == b"12345"
