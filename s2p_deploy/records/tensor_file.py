"""TensorFile: a safetensors file whose header is read once and whose tensors are read one at a time."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError
from s2p_deploy.records.typed_json import reading_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class TensorFile:
    """The tensors of a file by name.

    Tensors are copied out by plain reads, not mapped: the pages of a map count as this process's memory until the file
    is closed, which for a model would be all of its weights.
    """

    def __init__(self, path: Path) -> None:
        """Reads and checks the header.

        Raises:
            IntegrityError: it is no whole safetensors file.
        """
        from safetensors import safe_open

        self.path = path
        # the library checks that the tensors fill the data without gaps, and the file's length
        with reading_tensors(path), safe_open(path, "pt"), path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            entries: dict[str, dict[str, Any]] = json.loads(opened.read(length))
        entries.pop("__metadata__", None)
        self._entries, self._data = entries, 8 + length

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of all tensors, in the order of the file's header."""
        return tuple(self._entries)

    def form(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Returns the dtype of a tensor, as safetensors names it, and its shape. Raises InputError as :meth:`read`."""
        if name not in self._entries:
            raise InputError(f"{self.path} lacks {name}: make the artifact again")
        return self._entries[name]["dtype"], tuple(self._entries[name]["shape"])

    def read(self, name: str) -> Tensor:
        """Reads a tensor in its own dtype, on the CPU.

        Raises:
            InputError: there is none of that name.
            IntegrityError: it cannot be read, or has a type that is none of the usual ones.
        """
        import torch

        kind, shape = self.form(name)
        with reading_tensors(self.path), self.path.open("rb") as opened:
            dtype = _torch_dtypes()[kind]
            data = bytearray(math.prod(shape) * dtype.itemsize)
            opened.seek(self._data + self._entries[name]["data_offsets"][0])
            if opened.readinto(data) != len(data):
                raise ValueError("the file became shorter")
            return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _torch_dtypes() -> dict[str, Any]:
    import torch

    floats = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    integers = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    return floats | integers | {"BOOL": torch.bool}
