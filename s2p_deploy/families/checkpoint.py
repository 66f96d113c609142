"""Checkpoint: the tensors of a network's folder in safetensors, in one file or in shards, read one at a time.

Plain reads in place of a memory map: pages of a map count as this process's memory until the file is closed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

# What the two libraries call a network's weights, without the suffix.
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"

# safetensors' names, in the order in which its own writer puts tensors into a file: data stays aligned.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorForm:
    """Dtype and shape of a tensor: enough to say where its bytes lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's file and position, and its dtype in safetensors' words."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        """Tells floating-point numbers from integers and truth values."""
        return self.dtype.startswith(("F", "BF"))


class NetworkTensors(Protocol):
    """The tensors that a network can be given, stored or converted, by their names."""

    @property
    def place(self) -> Path:
        """Returns the file, or the index of shards, that they come from."""

    @property
    def is_sharded(self) -> bool:
        """Returns whether they come from several files."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Returns every tensor's dtype and shape."""


class Checkpoint:
    """The tensors of a folder, or of one file. Only headers are read when it is opened.

    Attributes:
        place: the file, or the index of the shards.
        tensors: every tensor by its name.
        is_sharded: whether there are several files.
    """

    place: Path
    is_sharded: bool
    tensors: Mapping[str, StoredTensor]

    def __init__(self, folder: Path, weights: str = DIFFUSERS_WEIGHTS) -> None:
        """Finds every tensor.

        Args:
            folder: of one network, or a file.
            weights: the file's name in the folder, without its suffix.

        Raises:
            InputError: there are no weights, or both a file and shards; a file is no whole safetensors file; the index
                of shards names a shard or a tensor that is not there.
        """
        if folder.is_file():
            self.place, self.is_sharded, self.tensors = folder, False, _tensors(folder)
            return
        file, index = folder / f"{weights}.safetensors", folder / f"{weights}.safetensors.index.json"
        shards = sorted(folder.glob(f"{weights}-*-of-*.safetensors"))
        other = next((path for path in (index, *shards) if path.exists()), None)
        if file.exists() and other is not None:
            raise InputError(f"{folder} has both {file.name} and {other.name}: delete what is left of the other one")
        if not index.exists() and shards:
            raise InputError(f"{index} is missing, which says what is in {shards[0].name}: get it again")
        self.is_sharded = index.exists()
        self.place = index if self.is_sharded else file
        self.tensors = _sharded_tensors(index) if self.is_sharded else _tensors(file)

    def form(self, name: str) -> TensorForm:
        """Returns dtype and shape of a tensor.

        Raises:
            InputError: there is none of that name, or its numbers are neither float32 nor float16 nor bfloat16.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise InputError(f"{self.place} lacks {name}: it is no whole pipeline, or another configuration's")
        if stored.dtype not in DTYPES:
            raise InputError(f"{stored.file}: {name} is {stored.dtype}: give weights in {', '.join(DTYPES)}")
        return TensorForm(DTYPES[stored.dtype], stored.shape)

    def read(self, name: str) -> Tensor:
        """Reads a tensor in its own dtype, to the CPU.

        Raises:
            InputError: as :meth:`form`; the file has become shorter; a number is not finite.
        """
        form, stored = self.form(name), self.tensors[name]
        data = bytearray(form.bytes)
        try:
            with stored.file.open("rb") as opened:
                opened.seek(stored.start)
                count = opened.readinto(data)
        except OSError as error:
            raise InputError(f"{stored.file} cannot be read ({error.strerror or error})") from error
        if count != len(data):
            raise InputError(f"{stored.file} ends before the data of {name}: it was changed meanwhile")
        if not data:
            return torch.empty(form.shape, dtype=form.dtype)
        tensor = torch.frombuffer(data, dtype=form.dtype).view(form.shape)
        if not tensor.isfinite().all():
            raise InputError(f"{stored.file}: {name} holds NaN or infinity: the pipeline's weights are broken")
        return tensor


def check_no_pointer(file: Path) -> None:
    """Checks that a file is itself there.

    Raises:
        InputError: it is what git keeps in place of a large file.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error})") from error
    if start == _POINTER:
        raise InputError(f"{file} is a pointer of git-lfs in place of the file: run `git lfs pull` in its repository")


def _sharded_tensors(index: Path) -> dict[str, StoredTensor]:
    files = weight_map(index)
    shards = {name: _tensors(index.parent / name) for name in sorted(set(files.values()))}
    for tensor, shard in files.items():
        if tensor not in shards[shard]:
            raise InputError(f"{index.parent / shard} lacks {tensor}, which {index.name} says is there: get both again")
    return {tensor: shards[shard][tensor] for tensor, shard in files.items()}


def weight_map(index: Path) -> dict[str, str]:
    """Reads which file beside the index holds each tensor. Raises InputError where it cannot be read."""
    check_no_pointer(index)
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all("/" not in file and "\\" not in file for file in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of shards ({type(error).__name__}): get it again") from error
    if not plain:
        raise InputError(f"{index} names a file outside its folder: refused")
    return files


def _tensors(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise InputError(f"{file} is missing: give the whole pipeline, with its weights in safetensors")
    check_no_pointer(file)
    try:
        with safe_open(file, "pt"):  # checks the header, that tensors fill the data without gaps, and the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or not whole ({' '.join(str(error).split())}): get it again") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries: dict[str, Any] = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return {
        name: StoredTensor(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }
