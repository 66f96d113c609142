"""Safetensors files read and written one tensor at a time: models of any size pass through little memory.

Plain reads in place of a memory map: pages of a map count as this process's memory until the file is closed. The
library's own writer wants all tensors in memory at once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from s2p_deploy.errors import InputError
from s2p_deploy.records.files import writing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

_FILE = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_FILE}.index.json"


# safetensors' names, in the order in which its own writer puts tensors into a file: data stays aligned.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes of which the header's length is a multiple


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
class _StoredTensor:
    """A tensor's file and position, and its dtype in safetensors' words."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder. Only headers are read when it is opened."""

    def __init__(self, folder: Path) -> None:
        """Finds every tensor.

        Raises:
            InputError: there are no weights, a file is no whole safetensors file, or the index of shards names a shard
                or a tensor that is not there.
        """
        self.folder = folder
        index = folder / _INDEX
        self._tensors = _sharded_tensors(index) if index.exists() else _tensors(folder / _FILE)

    def form(self, name: str) -> TensorForm:
        """Returns dtype and shape of a tensor.

        Raises:
            InputError: there is none of that name, or its numbers are neither float32 nor float16 nor bfloat16.
        """
        stored = self._tensors.get(name)
        if stored is None:
            raise InputError(f"{self.folder} lacks {name}: it is no whole pipeline, or another configuration's")
        if stored.dtype not in DTYPES:
            raise InputError(f"{stored.file}: {name} is {stored.dtype}: give weights in {', '.join(DTYPES)}")
        return TensorForm(DTYPES[stored.dtype], stored.shape)

    def read(self, name: str) -> Tensor:
        """Reads a tensor in its own dtype, to the CPU.

        Raises:
            InputError: as :meth:`form`; the file has become shorter; a number is not finite.
        """
        form, stored = self.form(name), self._tensors[name]
        data = bytearray(form.bytes)
        try:
            with stored.file.open("rb") as opened:
                opened.seek(stored.start)
                count = opened.readinto(data)
        except OSError as error:
            raise InputError(f"{stored.file} cannot be read ({error.strerror or error})") from error
        if count != len(data):
            raise InputError(f"{stored.file} ends before the data of {name}: it was changed meanwhile")
        tensor = torch.frombuffer(data, dtype=form.dtype).view(form.shape)
        if not tensor.isfinite().all():
            raise InputError(f"{stored.file}: {name} holds NaN or infinity: the pipeline's weights are broken")
        return tensor


def _sharded_tensors(index: Path) -> dict[str, _StoredTensor]:
    files = _weight_map(index)
    shards = {name: _tensors(index.parent / name) for name in sorted(set(files.values()))}
    for tensor, shard in files.items():
        if tensor not in shards[shard]:
            raise InputError(f"{index.parent / shard} lacks {tensor}, which {index.name} says is there: get both again")
    return {tensor: shards[shard][tensor] for tensor, shard in files.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Reads which file beside the index holds each tensor."""
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all("/" not in file and "\\" not in file for file in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of shards ({type(error).__name__}): get it again") from error
    if not plain:
        raise InputError(f"{index} names a file outside its folder: refused")
    return files


def _tensors(file: Path) -> dict[str, _StoredTensor]:
    if not file.is_file():
        raise InputError(f"{file} is missing: streaming needs the denoiser's weights in safetensors")
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
        name: _StoredTensor(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


def write_tensor_file(
    path: Path,
    forms: Mapping[str, TensorForm],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the bytes that safetensors' ``save_file`` would write, and holds one tensor at a time.

    Args:
        path: the file; whoever calls gives it its final place once it is whole.
        forms: every tensor of the file by its name, of a dtype in ``DTYPES``.
        read: gives a tensor of ``forms`` by its name, called once for each in the order of the file.
        metadata: text to keep in the header.

    Raises:
        InputError: the file cannot be written, such as on a full disk.
    """
    order = sorted(forms, key=lambda name: (list(DTYPES).index(_NAMES[forms[name].dtype]), name))
    with writing(path), path.open("wb") as opened:
        opened.write(_header([(name, forms[name]) for name in order], metadata))
        for name in order:
            _append(opened, read(name), forms[name])


def _append(opened: BinaryIO, tensor: Tensor, form: TensorForm) -> None:
    assert (tensor.dtype, tuple(tensor.shape)) == (form.dtype, form.shape), f"{tensor.shape} is not {form}"
    tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(opened)


def _header(tensors: list[tuple[str, TensorForm]], metadata: Mapping[str, str] | None) -> bytes:
    """Formats the header: eight bytes of length, then dtype, shape and position of every tensor as JSON."""
    ends = list(accumulate((form.bytes for _, form in tensors), initial=0))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for (name, form), start, end in zip(tensors, ends, ends[1:], strict=False):
        entries[name] = {"dtype": _NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
