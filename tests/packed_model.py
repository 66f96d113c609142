"""A calibrated model whose weights of few bits are stored as codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.numpy import save_file

from s2p_deploy.calib.quantization.packed_weights import packed_weights
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
from s2p_deploy.families import new_hot_denoiser
from s2p_deploy.records import CalibratedModel, write_artifact, write_packed_weights

if TYPE_CHECKING:
    from pathlib import Path


def packed_copy(model: CalibratedModel, folder: Path) -> CalibratedModel:
    """Writes ``model`` to ``folder`` once more, with ``low_bit.safetensors``."""
    config = json.loads((model.folder / "denoiser_config.json").read_text(encoding="utf-8"))
    hot = new_hot_denoiser(config, model.time_table())
    hot.load_state_dict({name: torch.from_numpy(value) for name, value in model.weights().items()})
    scales = {name: torch.from_numpy(value) for name, value in model.weight_scales().items()}
    codes = packed_weights(QuantizedDenoiser(hot, model.plan, scales))
    packed = {f"network.{site}.weight" for site in codes}

    def fill(out: Path) -> dict[str, Any]:
        for name in model.manifest.files:
            (out / name).write_bytes((model.folder / name).read_bytes())
        floating = {name: value for name, value in model.weights().items() if name not in packed}
        save_file(floating, out / "weights.safetensors")
        write_packed_weights(codes, out / "low_bit.safetensors")
        return model.manifest.content

    manifest = model.manifest
    write_artifact(folder, kind=manifest.kind, base=manifest.base, recipe=manifest.recipe, fill=fill)
    return CalibratedModel.open(folder)
