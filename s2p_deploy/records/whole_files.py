"""Files that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file in one piece."""
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file in one piece; the same tensors give the same bytes."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda temporary: save_file(whole, temporary))


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for ``source``'s content: a hard link where the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_or_copy_files(source: Path, target: Path) -> None:
    """A new folder ``target`` with the files of the flat folder ``source``."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        link_or_copy(path, target / path.name)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    with temporary.open("rb") as opened:
        os.fsync(opened.fileno())
    temporary.replace(path)
