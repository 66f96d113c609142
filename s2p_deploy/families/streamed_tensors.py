"""Safetensors files written one tensor at a time: the library's own writer wants all tensors in memory at once."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO

import torch

from s2p_deploy.families.checkpoint import DTYPES
from s2p_deploy.records.files import writing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.families.checkpoint import TensorForm

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes of which the header's length is a multiple


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
