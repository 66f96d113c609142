"""The weights of a pipeline's denoiser on disk, in one safetensors file or in shards; read one tensor at a time.

Plain reads in place of a memory map: pages of a map count as this process's memory until the file is closed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from s2p_deploy.calib.streaming.tensor_file import DTYPES, TensorForm
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_FILE = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_FILE}.index.json"


@dataclass(frozen=True)
class _Place:
    """Where the data of a tensor lies, and what it is in safetensors' words."""

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
        self._places = _sharded_places(index) if index.exists() else _places(folder / _FILE)

    def form(self, name: str) -> TensorForm:
        """Dtype and shape of a tensor.

        Raises:
            InputError: there is none of that name, or its numbers are neither float32 nor float16 nor bfloat16.
        """
        place = self._places.get(name)
        if place is None:
            raise InputError(f"{self.folder} lacks {name}: it is no whole pipeline, or another configuration's")
        if place.dtype not in DTYPES:
            raise InputError(f"{place.file}: {name} is {place.dtype}: give weights in {', '.join(DTYPES)}")
        return TensorForm(DTYPES[place.dtype], place.shape)

    def read(self, name: str) -> Tensor:
        """A tensor in its own dtype, on the CPU.

        Raises:
            InputError: as :meth:`form`; the file has become shorter; a number is not finite.
        """
        form, place = self.form(name), self._places[name]
        data = bytearray(form.bytes)
        try:
            with place.file.open("rb") as opened:
                opened.seek(place.start)
                count = opened.readinto(data)
        except OSError as error:
            raise InputError(f"{place.file} cannot be read ({error.strerror or error})") from error
        if count != len(data):
            raise InputError(f"{place.file} ends before the data of {name}: it was changed meanwhile")
        tensor = torch.frombuffer(data, dtype=form.dtype).view(form.shape)
        if not tensor.isfinite().all():
            raise InputError(f"{place.file}: {name} holds NaN or infinity: the pipeline's weights are broken")
        return tensor


def _sharded_places(index: Path) -> dict[str, _Place]:
    files = _weight_map(index)
    shards = {name: _places(index.parent / name) for name in sorted(set(files.values()))}
    for tensor, shard in files.items():
        if tensor not in shards[shard]:
            raise InputError(f"{index.parent / shard} lacks {tensor}, which {index.name} says is there: get both again")
    return {tensor: shards[shard][tensor] for tensor, shard in files.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index."""
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all("/" not in file and "\\" not in file for file in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of shards ({type(error).__name__}): get it again") from error
    if not plain:
        raise InputError(f"{index} names a file outside its folder: refused")
    return files


def _places(file: Path) -> dict[str, _Place]:
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
        name: _Place(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }
