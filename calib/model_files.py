"""The files of a CalibratedModel, written from what calibration found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.atomic import write_tensors, write_text
from s2p_deploy.calib.quantization.packed_weights import packed_weights
from s2p_deploy.calib.summary import average_bits
from s2p_deploy.numerics import INT4
from s2p_deploy.records import ScaleTable, Simulation, TimestepTable
from s2p_deploy.records.packed_weights import write_packed_weights
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table
from s2p_deploy.records.simulation import write_simulation
from s2p_deploy.records.timestep_table import write_timestep_table
from s2p_deploy.timesteps import angles_from_alphas, spread_over_rows

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from s2p_deploy.calib.job import Job
    from s2p_deploy.calib.quantization.scale_start import StartingGrids
    from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
    from s2p_deploy.calib.start import Start
    from s2p_deploy.records import PackedWeight, TransformSpec


@dataclass(frozen=True)
class Found:
    """What calibration found: a denoiser transformed by ``spec``, and its grids on the calibrated ``rows``."""

    denoiser: QuantizedDenoiser
    spec: TransformSpec
    rows: tuple[int, ...]
    grids: StartingGrids


def write_model(folder: Path, job: Job, start: Start, found: Found) -> dict[str, Any]:
    """Writes the files that every CalibratedModel has; returns the part of the content that follows from them."""
    denoiser, rows, grids = found.denoiser, found.rows, found.grids
    timesteps = _timestep_table(job, start, rows)
    scales = spread_over_rows(grids.scales.numpy(), timesteps)
    packed = _low_bit_weights(denoiser)
    left_out = {f"unet.{site}.weight" for site in packed}
    weights = {name: value for name, value in denoiser.hot_state().items() if name not in left_out}
    write_tensors(folder / "weights.safetensors", weights)
    write_tensors(folder / "weight_scales.safetensors", denoiser.weight_scales())
    write_packed_weights(packed, folder / "low_bit.safetensors")
    projections = torch.from_numpy(start.time_table.projections)
    write_tensors(folder / "time_table.safetensors", {"time_projections": projections})
    write_scale_table(ScaleTable(scales, denoiser.plan.point_names(), rows), folder / "act_scales.safetensors")
    write_timestep_table(timesteps, folder / "timesteps.json")
    write_plan(denoiser.plan, folder / "plan.yaml")
    write_text(folder / "denoiser_config.json", json.dumps(start.config, indent=1) + "\n")
    if job.recipe.simulation_only:
        write_simulation(_simulation(grids, timesteps, scales), folder / "simulation.safetensors")
    return {
        "time_slices": {name: list(columns) for name, columns in start.time_table.slices.items()},
        "tokens": start.pipe.tokenizer.model_max_length,
        "asked": {name: value for name, value in job.asked().items() if name != "recipe"},
        "average_bits": average_bits(denoiser, start.pipe.tokenizer.model_max_length),
        "transforms": found.spec.to_json(),
        "simulation_only": job.recipe.simulation_only,
    }


def _timestep_table(job: Job, start: Start, rows: tuple[int, ...]) -> TimestepTable:
    scheduler = start.pipe.scheduler
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    angle = angles_from_alphas(scheduler.alphas_cumprod.double().numpy())
    return TimestepTable(type(scheduler).__name__, config, job.recipe.sampling.steps, rows, angle)


def _low_bit_weights(denoiser: QuantizedDenoiser) -> dict[str, PackedWeight]:
    """Codes of the sites with fewer than 16 levels; INT4 sites keep their float weight, from which training goes on."""
    return {site: weight for site, weight in packed_weights(denoiser).items() if weight.format != INT4.name}


def _simulation(grids: StartingGrids, timesteps: TimestepTable, scales: NDArray[np.float32]) -> Simulation:
    """Every row takes offset and relaxation of the nearest calibrated row at or below it, on its own scale's grid."""
    known = torch.tensor(timesteps.calibrated)
    nearest = torch.searchsorted(known, torch.arange(timesteps.rows), right=True).sub(1).clamp_min(0)
    offsets = torch.zeros_like(grids.scales) if grids.offsets is None else grids.offsets
    relaxed = torch.zeros(len(known), dtype=torch.bool) if grids.relaxed is None else grids.relaxed
    own = torch.from_numpy(scales)
    rows = relaxed[nearest].nonzero().flatten().tolist()
    return Simulation((own * (offsets[nearest] / own).round()).numpy(), tuple(rows))
