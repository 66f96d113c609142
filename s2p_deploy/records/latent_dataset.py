"""LatentDataset: inputs and outputs of the floating-point denoiser along its own trajectories (Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.artifacts import Manifest, open_artifact
from s2p_deploy.records.tensor_file import TensorFile
from s2p_deploy.records.typed_json import reading_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import DTypeLike, NDArray

# name -> safetensors' dtype, and number of axes
_LATENTS = {"latents": ("F16", 4), "cond": ("F16", 4)}
_UNGUIDED = {"uncond": ("F16", 4)}  # where a pipeline predicts without the prompt too
_INDICES = {"timestep_indices": ("I64", 1), "prompt": ("I64", 1)}
_TEXTS = {"texts": ("F16", 3), "added_cond": ("F32", 2), "cond_text": ("I64", 1), "uncond_text": ("I64", 1)}


class MappedRows:
    """The rows of several arrays, one array after the other, [n, ...]; they stay in their files until they are taken.

    Example:
        >>> rows = MappedRows([np.zeros((2, 3), np.float16), np.ones((1, 3), np.float16)])
        >>> rows.shape, rows[2].tolist(), rows[[0, 2]][:, 0].tolist()
        ((3, 3), [1.0, 1.0, 1.0], [0.0, 1.0])
    """

    def __init__(self, parts: Sequence[NDArray[np.float16]]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, which: int | slice | Sequence[int] | NDArray[Any]) -> NDArray[np.float16]:
        """Copies rows out: one without the first axis, or some [m, ...]. Raises IndexError where one is not there."""
        chosen = np.arange(len(self))[which]
        rows = np.atleast_1d(chosen)
        taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
        owners = np.searchsorted(self._ends, rows, side="right")
        for owner in np.unique(owners):
            part, here = self._parts[owner], owners == owner
            taken[here] = part[rows[here] - (self._ends[owner] - len(part))]
        return taken if chosen.ndim else taken[0]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Copies all rows into memory, which is the only way."""
        return self[:].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class LatentDataset:
    """Samples of all prompts, in prompt order. What is large stays in its files until it is taken.

    ``latents`` float16 [n, C, H, W] denoiser inputs (after ``scale_model_input``); ``timestep_indices`` int64 [n] their
    timestep indices; ``cond`` and ``uncond`` float16 [n, C', H, W] the teacher's output of either CFG branch, or of the
    one where ``guided`` is false; ``prompt`` int64 [n] index of the prompt;
    ``texts`` float16 [m, tokens, D] distinct text states, which the teacher had in this
    precision too, and ``added_cond`` float32 [m, A], what the time features depend on besides the timestep (A may be
    0); ``cond_text`` and ``uncond_text`` int64 [prompts] index both.

    Example:
        >>> dataset = LatentDataset.open(Path("build/dataset"))
        >>> dataset.latents.shape == dataset.cond.shape == (len(dataset.timestep_indices), 4, 8, 8)
        True
    """

    folder: Path
    manifest: Manifest
    latents: MappedRows
    timestep_indices: NDArray[np.int64]
    cond: MappedRows
    uncond: MappedRows
    prompt: NDArray[np.int64]
    texts: NDArray[np.float16]
    added_cond: NDArray[np.float32]
    cond_text: NDArray[np.int64]
    uncond_text: NDArray[np.int64]
    guided: bool = True

    @staticmethod
    def open(folder: Path) -> LatentDataset:
        """Verifies a dataset and maps its files into memory, which must not be changed while it is used.

        Raises:
            InputError: there is none, or a tensor is missing. IntegrityError: it was changed, or is damaged.
        """
        manifest = open_artifact(folder, "LatentDataset")
        paths = [folder / name for name in sorted(manifest.files) if name.startswith("shard-")]
        if not paths:
            raise IntegrityError(f"{folder} has no shards: make the dataset again")
        guided = bool(manifest.content.get("sampling", {}).get("guided", True))
        planes = _LATENTS | (_UNGUIDED if guided else {})
        shards = [_mapped(path, planes | _INDICES) for path in paths]
        for path, shard in zip(paths, shards, strict=True):
            for name in planes:
                first = shards[0]["latents" if name == "latents" else "cond"].shape
                if shard[name].shape[1:] != first[1:] or shard[name].shape[2:] != shard["latents"].shape[2:]:
                    raise _damaged(path, name, shard[name].dtype, shard[name].shape)
        fields: dict[str, Any] = {name: MappedRows([shard[name] for shard in shards]) for name in planes}
        fields = {"uncond": fields["cond"], "guided": guided} | fields
        fields |= {name: np.concatenate([shard[name] for shard in shards]) for name in _INDICES}
        fields |= _mapped(folder / "texts.safetensors", _TEXTS)
        return LatentDataset(folder, manifest, **fields)


def _mapped(path: Path, forms: Mapping[str, tuple[str, int]]) -> dict[str, NDArray[Any]]:
    """Maps tensors of a file, whose dtypes and numbers of axes are known.

    Raises:
        InputError: the file lacks one. IntegrityError: one has another dtype or number of axes.
    """
    from safetensors.torch import load_file

    file = TensorFile(path)
    for name, (kind, axes) in forms.items():
        found, shape = file.form(name)
        if found != kind or len(shape) != axes:
            raise _damaged(path, name, found, shape)
    with reading_tensors(path):
        tensors = load_file(path)  # maps the file; nothing is read before it is used
        return {name: tensors[name].numpy() for name in forms}


def _damaged(path: Path, name: str, dtype: object, shape: tuple[int, ...]) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: {name} is {dtype} {list(shape)}: make the dataset again")
