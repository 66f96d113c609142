"""Weights of few levels as codes, several to a byte: the file ``low_bit.safetensors``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from s2p_deploy.errors import IntegrityError
from s2p_deploy.numerics import dequantize, quantize
from s2p_deploy.records.typed_json import reading_tensors
from s2p_research.formats import LOW_BIT, weight_format
from s2p_research.packing import pack_codes, unpack_codes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from s2p_deploy.calib import QuantizedDenoiser
    from s2p_deploy.numerics import IntegerFormat

FILE = "low_bit.safetensors"


@dataclass(frozen=True)
class PackedWeight:
    """``codes`` uint8 as :func:`pack_codes` gives them; ``shape`` of the weight; ``format`` of its codes."""

    codes: NDArray[np.uint8]
    shape: tuple[int, ...]
    format: str

    def values(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Computes the weight float32 ``shape``: codes times ``scale`` float32 [out, 1, ...]."""
        codes = unpack_codes(torch.from_numpy(self.codes), format_of(self), self.shape)
        values: NDArray[np.float32] = dequantize(codes.float(), torch.from_numpy(scale)).numpy()
        return values


def format_of(weight: PackedWeight) -> IntegerFormat:
    """Returns the format of a packed weight. Raises IntegrityError where there is none of its name."""
    fmt = next((fmt for fmt in LOW_BIT if fmt.name == weight.format), None)
    if fmt is None:
        raise IntegrityError(f"a packed weight has the format {weight.format!r}: make the calibrated model again")
    return fmt


def packed_weights(denoiser: QuantizedDenoiser) -> dict[str, PackedWeight]:
    """Packs the weights of 3, 5 or 9 levels, by layer, under the denoiser's own scales.

    Codes times scale is what the denoiser computes with, so nothing is lost that a stored model needs.
    """
    scales = denoiser.weight_scales()
    packed = {}
    for layer in denoiser.plan.layers:
        fmt = weight_format(layer)
        if fmt in LOW_BIT:
            weight = denoiser.layer(layer.name).get_parameter("weight").detach()
            codes = pack_codes(quantize(weight, scales[layer.name], fmt), fmt)
            packed[layer.name] = PackedWeight(codes.numpy(), tuple(weight.shape), fmt.name)
    return packed


def write_packed_weights(weights: Mapping[str, PackedWeight], path: Path) -> None:
    """Writes codes by layer, format and shape as metadata; nothing without any."""
    if weights:
        metadata = {layer: f"{packed.format} {','.join(map(str, packed.shape))}" for layer, packed in weights.items()}
        save_file({layer: packed.codes for layer, packed in weights.items()}, path, metadata=metadata)


def read_packed_weights(path: Path) -> dict[str, PackedWeight]:
    """Reads the file of :func:`write_packed_weights`; empty where there is none."""
    if not path.exists():
        return {}
    packed = {}
    with reading_tensors(path), safe_open(path, "numpy") as opened:
        for layer, description in opened.metadata().items():
            fmt, shape = description.split(" ")
            packed[layer] = PackedWeight(opened.get_tensor(layer), tuple(int(size) for size in shape.split(",")), fmt)
    return packed
