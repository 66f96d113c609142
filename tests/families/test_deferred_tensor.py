from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from s2p_deploy.families.checkpoint import TensorForm
from s2p_deploy.families.deferred_tensor import DeferredTensor

STORED = {"a": torch.arange(24.0).view(6, 4), "b": torch.arange(6, dtype=torch.float16).view(2, 3, 1, 1)}
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "as it is": lambda a, b: a,
    "third of three": lambda a, b: torch.chunk(a, 3, dim=0)[2],
    "halves swapped": lambda a, b: torch.cat(a.chunk(2, dim=0)[::-1], dim=0),
    "transposed": lambda a, b: a.T.contiguous(),
    "rows": lambda a, b: a[2:4, :].clone().detach(),
    "convolution to product": lambda a, b: b[:, :, 0, 0],
    "of two tensors": lambda a, b: torch.cat([a.flatten(), b.flatten().float()]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_read_is_what_the_operation_makes_of_the_data(name: str) -> None:
    deferred = [
        DeferredTensor.stored(key, TensorForm(tensor.dtype, tuple(tensor.shape)), STORED.__getitem__)
        for key, tensor in STORED.items()
    ]
    made, expected = OPERATIONS[name](*deferred), OPERATIONS[name](*STORED.values())
    assert isinstance(made, DeferredTensor)
    assert (made.shape, made.dtype, made.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert torch.equal(made.read(), expected)


def test_nothing_is_read_before_it_is_asked_for_and_then_only_what_it_needs() -> None:
    read: list[str] = []

    def reading(name: str) -> torch.Tensor:
        read.append(name)
        return STORED[name]

    a, b = (DeferredTensor.stored(name, TensorForm(t.dtype, tuple(t.shape)), reading) for name, t in STORED.items())
    third, joined = torch.chunk(a, 3)[0], torch.cat([a.flatten(), b.flatten().float()])
    assert read == []
    assert (third.sources, joined.sources) == ({"a"}, {"a", "b"})
    third.read()
    assert read == ["a"]


def test_a_tensor_that_is_there_needs_no_source() -> None:
    made = DeferredTensor.of(torch.eye(2))
    assert (made.sources, made.read().tolist()) == (set(), [[1, 0], [0, 1]])
    assert DeferredTensor.of(made) is made
