from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s2p_deploy.errors import InputError
from s2p_deploy.families.checkpoint import TensorForm
from s2p_deploy.families.streamed_tensors import write_tensor_file

TENSORS = {
    "half": torch.arange(6, dtype=torch.float16).view(2, 3),
    "b.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "a.weight": torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(1)),
    "brain": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "scalar": torch.tensor(7.0),
    "späte": torch.ones(1),
}
FORMS = {name: TensorForm(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("metadata", [None, {"a line": "é\n"}])
def test_the_bytes_are_those_of_the_librarys_own_writer(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(TENSORS, tmp_path / "theirs", metadata=metadata)
    write_tensor_file(tmp_path / "ours", FORMS, TENSORS.__getitem__, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    read: list[weakref.ref[torch.Tensor]] = []

    def fresh(name: str) -> torch.Tensor:
        assert [tensor for tensor in read if tensor() is not None] == []
        tensor = TENSORS[name].clone()
        read.append(weakref.ref(tensor))
        return tensor

    write_tensor_file(tmp_path / "file", FORMS, fresh)
    assert len(read) == len(TENSORS)


def test_a_slice_is_written_as_its_own_numbers(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    write_tensor_file(tmp_path / "ours", {"x": TensorForm(torch.float32, (3, 2))}, lambda _: whole[:, 1:3])
    save_file({"x": whole[:, 1:3].contiguous()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_a_full_disk_is_one_line(elements: int) -> None:
    forms = {"x": TensorForm(torch.float32, (elements,))}
    with pytest.raises(InputError, match=r"^/dev/full cannot be written \(.+\): make room, or choose another --out$"):
        write_tensor_file(Path("/dev/full"), forms, lambda _: torch.zeros(elements))
