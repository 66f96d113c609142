from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import CalibratedModel, TransformSpec
from s2p_deploy.records.tensor_file import TensorFile

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "whole": torch.arange(6).reshape(2, 3),
    "half": torch.full((2, 2), 0.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3.0),
}


def test_tensors_come_back_in_their_own_dtype(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "t.safetensors", metadata={"any": "text"})
    file = TensorFile(tmp_path / "t.safetensors")
    assert set(file.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    with pytest.raises(InputError, match=r"t\.safetensors lacks other"):
        file.read("other")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(TENSORS, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="is damaged"):
        TensorFile(path)
    with pytest.raises(IntegrityError, match="is damaged"):
        [file.read(name) for name in TENSORS]


def test_a_models_header_is_read_once_for_all_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"network.l{number}.weight": torch.full((2, 2), float(number)) for number in range(20)}
    save_file(weights, tmp_path / "weights.safetensors")
    nothing: Any = None
    model = CalibratedModel(
        tokens=1,
        time_slices={},
        transforms=TransformSpec(),
        folder=tmp_path,
        manifest=nothing,
        plan=nothing,
        scales=nothing,
        timesteps=nothing,
    )
    opened: list[object] = []
    safe_open = safetensors.safe_open

    def counted(path: object, framework: str) -> object:
        opened.append(path)
        return safe_open(path, framework)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    for name, weight in weights.items():
        np.testing.assert_array_equal(model.tensor(name), weight.numpy())
    assert len(opened) == 1
    with pytest.raises(InputError, match=r"weights\.safetensors lacks network\.other"):
        model.tensor("network.other")
