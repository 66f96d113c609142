"""Single files for tests: the networks of a pipeline's folder under their original names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from benchmarks.full_size.original_names import TEXT_ENCODERS, Tensors, original_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path


def write_single_file(
    path: Path,
    folder: Path,
    *,
    without: Collection[str] = (),
    text: Mapping[str, str] | None = None,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes the networks of a pipeline's folder into one file.

    Args:
        path: the file.
        folder: in diffusers' format, one file per network.
        without: components that are left out.
        text: prefixes of the text encoders (None: those of the pipeline's family).
        change: what becomes of all tensors by their original names.
        metadata: of the file.
    """
    index = json.loads((folder / "model_index.json").read_text())
    prefixes = TEXT_ENCODERS[index["_class_name"]] if text is None else text
    networks = {
        name: (_network(folder / name), json.loads((folder / name / "config.json").read_text()))
        for name in ("unet", "transformer", "vae", *prefixes)
        if (folder / name).is_dir() and name not in without
    }
    tensors = change(original_tensors(networks, prefixes))
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(whole, path, metadata=metadata)
    return path


def _network(folder: Path) -> Tensors:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)
