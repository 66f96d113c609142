"""PackedWeight: a site's weight as codes of few bits, several to a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.strict import reading_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedWeight:
    """``codes`` uint8 as ``numerics.pack_codes`` gives them; ``shape`` of the weight; ``format`` of its codes."""

    codes: NDArray[np.uint8]
    shape: tuple[int, ...]
    format: str

    def values(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weight float32 ``shape``: codes times ``scale`` float32 [out, 1, ...]."""
        import torch

        from s2p_deploy.numerics import dequantize, format_by_name, unpack_codes

        fmt = format_by_name(self.format)
        if fmt is None:
            raise IntegrityError(f"a packed weight has the format {self.format!r}: make the calibrated model again")
        codes = unpack_codes(torch.from_numpy(self.codes), fmt, self.shape)
        values: NDArray[np.float32] = dequantize(codes.float(), torch.from_numpy(scale)).numpy()
        return values


def write_packed_weights(weights: Mapping[str, PackedWeight], path: Path) -> None:
    """Writes ``low_bit.safetensors``: by site, codes as a tensor, format and shape as metadata; nothing without any."""
    if weights:
        metadata = {site: f"{packed.format} {','.join(map(str, packed.shape))}" for site, packed in weights.items()}
        save_file({site: packed.codes for site, packed in weights.items()}, path, metadata=metadata)


def packed_sites(path: Path) -> tuple[str, ...]:
    """The sites of ``low_bit.safetensors``; none where there is no file."""
    if not path.exists():
        return ()
    with reading_tensors(path), safe_open(path, "numpy") as opened:
        return tuple(opened.keys())


def read_packed_weight(path: Path, site: str) -> PackedWeight:
    """One site's weight; the others are not read."""
    with reading_tensors(path), safe_open(path, "numpy") as opened:
        fmt, shape = opened.metadata()[site].split(" ")
        return PackedWeight(opened.get_tensor(site), tuple(int(size) for size in shape.split(",")), fmt)
