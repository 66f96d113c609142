from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s2p_deploy.errors import InputError
from s2p_deploy.families.checkpoint import Checkpoint, TensorForm

FILE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
TENSORS = {
    "single": torch.tensor([[0.1, -2.0], [3.0, 4.0]]),
    "half": torch.tensor([0.1, 7.0], dtype=torch.float16),
    "brain": torch.tensor([0.1, 7.0, 9.0], dtype=torch.bfloat16),
    "codes": torch.tensor([1, 2, 3], dtype=torch.int8),
    "broken": torch.tensor([1.0, float("nan")], dtype=torch.float16),
}
SHARDS = {"one.safetensors": ("single", "broken"), "two.safetensors": ("half", "brain", "codes")}


@pytest.fixture(params=["one file", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return in_one_file(tmp_path) if request.param == "one file" else in_shards(tmp_path)


def in_one_file(folder: Path) -> Path:
    save_file(TENSORS, folder / FILE)
    return folder


def in_shards(folder: Path) -> Path:
    for file, names in SHARDS.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["single", "half", "brain"])
def test_a_tensor_comes_back_bit_for_bit_in_its_own_dtype(folder: Path, name: str) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.form(name) == TensorForm(TENSORS[name].dtype, tuple(TENSORS[name].shape))
    read = checkpoint.read(name)
    assert read.dtype == TENSORS[name].dtype
    assert torch.equal(read, TENSORS[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "lacks absent: it is no whole pipeline"),
        ("codes", r"codes is I8: give weights in F32, BF16, F16"),
        ("broken", "broken holds NaN or infinity"),
    ],
)
def test_a_tensor_that_cannot_be_used(folder: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        Checkpoint(folder).read(name)
    assert "\n" not in str(raised.value)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(in_one_file(tmp_path))
    cut(tmp_path / FILE, 12)
    with pytest.raises(InputError, match="ends before the data of half: it was changed meanwhile"):
        checkpoint.read("half")


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def weight_map(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda folder: cut(folder / "two.safetensors", 1), r"two\.safetensors is damaged or not whole"),
    "cut in the header": (lambda folder: cut(folder / "two.safetensors", 99), r"two\.safetensors is damaged or not"),
    "too long": (lambda folder: append(folder / "two.safetensors"), r"two\.safetensors is damaged or not whole"),
    "no shard": (lambda folder: (folder / "two.safetensors").unlink(), r"two\.safetensors is missing"),
    "not in its shard": (lambda folder: weight_map(folder, half="one.safetensors"), r"one\.safetensors lacks half"),
    "outside": (lambda folder: weight_map(folder, half="../one.safetensors"), "names a file outside its folder"),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "is no index of shards"),
    "no names": (lambda folder: (folder / INDEX).write_text('{"weight_map": {"half": 3}}'), "is no index of shards"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), "is no index of shards"),
    "nothing": (lambda folder: (folder / INDEX).unlink(), r"safetensors is missing: give the whole"),
}


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("case", BROKEN)
def test_shards_that_are_not_whole_are_refused_when_they_are_opened(tmp_path: Path, case: str) -> None:
    breaks, message = BROKEN[case]
    breaks(in_shards(tmp_path))
    with pytest.raises(InputError, match=message) as raised:
        Checkpoint(tmp_path)
    assert "\n" not in str(raised.value)
