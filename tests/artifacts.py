"""Small artifacts for tests, made of real classes: a calibrated UNet of the SD1 kind with 32 and 64 channels."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.numpy import save_file

from s2p_deploy.families import (
    IndexedDenoiser,
    QuantizableLayer,
    discover_layers,
    indexed_denoiser,
    network_config,
    time_table_of,
)
from s2p_deploy.numerics import format_by_name, least_squares_weight_scale, mse_best_scale
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import (
    ActivationQuantizer,
    Base,
    CalibratedModel,
    LayerPlan,
    PrecisionPlan,
    ScaleTable,
    TimestepTable,
    TimeTable,
    TransformSpec,
    write_artifact,
)
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table, write_timestep_table
from s2p_deploy.records.typed_json import json_data
from s2p_deploy.timesteps import angles_from_alphas, interpolate_scales

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = 1000
TOKENS = 6
CALIBRATED = (1, 201, 401, 601, 801, 981)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": ROWS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def tiny_config() -> dict[str, Any]:
    """The bundled architecture (8x8x4 latents, same blocks, 73 layers) at 32 and 64 channels, 6 tokens of 48."""
    return {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "cross_attention_dim": 48,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }


def tiny_unet(seed: int = 0, config: dict[str, Any] | None = None) -> UNet2DConditionModel:
    """Random weights that keep signals near unit size, so that every layer is exercised and none saturates."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(config or tiny_config()).eval()
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.weight.mul_(1.5)
    return unet


def tiny_inputs(batch: int = 2, seed: int = 1, width: int = 48) -> dict[str, np.ndarray]:
    """``sample``, ``timestep_index`` (mixed rows) and ``encoder_hidden_states`` [batch, 6, width], float32."""
    generator = np.random.default_rng(seed)
    return {
        "sample": generator.standard_normal((batch, 4, 8, 8)).astype(np.float32),
        "timestep_index": np.asarray([CALIBRATED[(3 * i + 1) % len(CALIBRATED)] for i in range(batch)], dtype=np.int64),
        "encoder_hidden_states": generator.standard_normal((batch, TOKENS, width)).astype(np.float32),
    }


def tiny_calibrated(
    folder: Path,
    weights: str = "int8",
    activations: str = "int8",
    *,
    seed: int = 0,
    recipe: str = "w8a8",
    config: dict[str, Any] | None = None,
    rewrite: Callable[[IndexedDenoiser], TransformSpec] | None = None,
) -> CalibratedModel:
    """A calibrated tiny denoiser (or one of another ``config``) with closed-form scales, written to ``folder``.

    ``conv_in`` and ``conv_out`` are W8A16, text layers keep A16, as in the presets. ``weights`` and ``activations`` are
    int8, int4 or none; both ``none`` gives what recipe ``fp`` gives. ``rewrite`` transforms the denoiser first.
    """
    unet = tiny_unet(seed, config)
    table = time_table_of(unet, ROWS)
    config = network_config(unet)
    denoiser = indexed_denoiser(unet, table)
    transforms = rewrite(denoiser) if rewrite else TransformSpec()
    plan = tiny_plan(discover_layers(denoiser), weights, activations)
    timesteps = _timesteps()
    scales = _scales(denoiser, plan, timesteps)

    def fill(out: Path) -> dict[str, Any]:
        state = {name: tensor.numpy() for name, tensor in denoiser.state_dict().items()}
        save_file(state, out / "weights.safetensors")
        save_file(_weight_scales(denoiser, plan), out / "weight_scales.safetensors")
        save_file({"time_projections": table.projections}, out / "time_table.safetensors")
        write_scale_table(scales, out / "act_scales.safetensors")
        write_plan(plan, out / "plan.yaml")
        write_timestep_table(timesteps, out / "timesteps.json")
        _write_config(config, out)
        return {"time_slices": _slices(table), "tokens": TOKENS, "transforms": json_data(transforms)}

    resolved = Recipe.load(recipe).model_dump(mode="json")
    write_artifact(folder, kind="CalibratedModel", base=Base("tiny", "0" * 64), recipe=resolved, fill=fill)
    return CalibratedModel.open(folder)


def tiny_plan(layers: tuple[QuantizableLayer, ...], weights: str, activations: str) -> PrecisionPlan:
    """The presets' plan by hand: layers that read one tensor share the quantizer that the first of them names."""
    plain = weights == activations == "none"
    quantizers: dict[int, str] = {}
    planned = []
    for layer in layers:
        edge = layer.name in {"conv_in", "conv_out"}
        floating = edge or layer.reads == "text" or activations == "none"
        quantizer = None if floating else quantizers.setdefault(layer.tensor, layer.name)
        kind = "none" if plain else "int8" if edge else weights
        planned.append(LayerPlan(layer.name, layer.op, kind, quantizer, "edge" if edge else "default"))
    names = tuple(dict.fromkeys(layer.activation_quantizer for layer in planned if layer.activation_quantizer))
    acts = tuple(
        ActivationQuantizer(n, activations, tuple(s.name for s in planned if s.activation_quantizer == n))
        for n in names
    )
    return PrecisionPlan(tuple(planned), acts)


def _timesteps() -> TimestepTable:
    betas = np.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, ROWS) ** 2
    angle = angles_from_alphas(np.cumprod(1 - betas))
    return TimestepTable("DDIMScheduler", SCHEDULER, len(CALIBRATED), CALIBRATED, angle)


@torch.no_grad()
def _scales(denoiser: IndexedDenoiser, plan: PrecisionPlan, timesteps: TimestepTable) -> ScaleTable:
    """MSE-best scales of every calibrated row, stretched over the rows so that a wrong row is visible."""
    names = plan.quantizer_names()
    measured = np.ones((len(CALIBRATED), len(names)), np.float32)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        denoiser.network.get_submodule(plan.quantizer(name).layers[0]).register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0]})
        )
        for name in names
    ]
    for index, row in enumerate(CALIBRATED):
        width = denoiser.network.config.cross_attention_dim
        inputs = {k: torch.from_numpy(v) for k, v in tiny_inputs(4, index, width).items()}
        inputs["timestep_index"] = torch.full((4,), row)
        denoiser(**inputs)
        stretch = 0.8 + 0.5 * index / len(CALIBRATED)
        for column, name in enumerate(names):
            fmt = format_by_name(plan.quantizer(name).activations)
            assert fmt is not None
            measured[index, column] = stretch * float(mse_best_scale(seen[name], fmt))
    for hook in hooks:
        hook.remove()
    return ScaleTable(interpolate_scales(measured, timesteps), names, CALIBRATED)


def _weight_scales(denoiser: IndexedDenoiser, plan: PrecisionPlan) -> dict[str, np.ndarray]:
    scales = {}
    for layer in plan.layers:
        fmt = format_by_name(layer.weights)
        if fmt is not None:
            weight = denoiser.network.get_submodule(layer.name).weight
            scales[layer.name] = least_squares_weight_scale(weight, fmt).numpy()
    return scales


def _slices(table: TimeTable) -> dict[str, list[int]]:
    return {name: [start, stop] for name, (start, stop) in table.slices.items()}


def _write_config(config: dict[str, Any], out: Path) -> None:
    text = json.dumps(config, indent=1, sort_keys=True)
    (out / "denoiser_config.json").write_text(text, encoding="utf-8")
