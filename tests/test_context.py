"""Context resolves devices, dtypes and threads, and refuses what PyTorch does not have."""

from __future__ import annotations

import pytest
import torch

from s2p_deploy.context import Context
from s2p_deploy.errors import InputError, MissingEnvironmentError


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Context().torch_device == torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Context().torch_device == torch.device("cuda")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Context("cuda:0").torch_device == torch.device("cuda:0")
    with pytest.raises(MissingEnvironmentError, match=r"cuda:1: PyTorch sees 1 CUDA devices"):
        _ = Context("cuda:1").torch_device


@pytest.mark.parametrize("name", ["gpu", "mps", "", "cuda:x"])
def test_a_device_of_another_kind(name: str) -> None:
    with pytest.raises(InputError, match="use auto, cpu, cuda or cuda:N"):
        _ = Context(name).torch_device


def test_the_dtype_is_pytorchs() -> None:
    assert Context(dtype="bfloat16").torch_dtype is torch.bfloat16


def test_threads_are_set_only_where_they_are_given() -> None:
    before = torch.get_num_threads()
    assert Context().set_threads() == before
    try:
        assert Context(threads=1).set_threads() == 1
    finally:
        torch.set_num_threads(before)
