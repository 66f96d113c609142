"""This machine: its GPUs, and the cache that compiled code is loaded from, which must be the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.engines import machine
from s2p_deploy.engines.machine import (
    compute_capability,
    free_gpu_memory,
    gpu_index,
    plain_name,
    private_folder,
    use_gpu,
)
from s2p_deploy.errors import MissingEnvironmentError
from tests.engines.stand_in_gpu import CAPABILITIES, FREE, stand_in_gpus


def test_the_folder_is_made_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = private_folder("kernels")
    assert folder == tmp_path / "s2p_deploy" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder("kernels") == folder


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    private_folder("kernels").chmod(mode)
    with pytest.raises(MissingEnvironmentError, match="not this user's alone"):
        private_folder("kernels")


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert private_folder("kernels") == tmp_path / ".cache" / "s2p_deploy" / "kernels"


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s2p_deploy").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingEnvironmentError, match="cannot be made"):
        private_folder("kernels")


def test_a_name_cannot_lead_out_of_its_folder() -> None:
    assert plain_name("a", "../../b c", "NVIDIA RTX/4090") == "a-.._.._b_c-NVIDIA_RTX_4090"


@pytest.mark.parametrize(
    ("flags", "overflow"),
    [
        ({"avx", "avx2", "fma"}, True),
        ({"avx2", "avx512f"}, True),
        ({"avx2", "avx_vnni"}, False),
        ({"avx512f", "avx512_vnni", "amx_int8"}, False),
        (set(), False),  # no x86 Linux: nothing is known against its kernels
    ],
)
def test_int8_products_overflow_without_vnni(flags: set[str], overflow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    assert machine.int8_products_overflow() is overflow


def test_a_device_names_a_gpu_or_stands_for_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = stand_in_gpus(monkeypatch)
    for current in (0, 1):
        gpus.current = current
        assert [gpu_index(name) for name in ("cuda:0", "cuda:1")] == [0, 1]
        assert [gpu_index(name) for name in ("auto", "cuda", "cpu")] == [current] * 3
    assert [compute_capability(f"cuda:{index}") for index in (0, 1)] == list(CAPABILITIES.values())
    assert [free_gpu_memory(f"cuda:{index}") for index in (0, 1)] == list(FREE.values())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpus(monkeypatch)
    with pytest.raises(MissingEnvironmentError, match="device cuda:2: PyTorch sees 2 CUDA devices here"):
        gpu_index("cuda:2")


def test_a_child_process_works_on_the_gpu_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = stand_in_gpus(monkeypatch)
    use_gpu("cuda:1")
    assert gpus.current == gpu_index() == 1
    for without_an_index in ("auto", "cuda", "cpu"):
        use_gpu(without_an_index)
    assert gpus.current == 1


def test_without_a_gpu_there_is_none_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpus(monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (compute_capability("cuda:1"), free_gpu_memory()) == (None, None)
    assert (gpu_index("cuda:1"), gpu_index("auto")) == (1, 0)
    use_gpu("cuda:1")  # a builder for the CPU takes no notice
