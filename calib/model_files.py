"""The files of a CalibratedModel, written from what calibration found."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib.quantization.packed_weights import packed_weights
from s2p_deploy.calib.summary import average_bits
from s2p_deploy.families import text_tokens, time_slices
from s2p_deploy.numerics import INT4
from s2p_deploy.records import ScaleTable, Simulation
from s2p_deploy.records.calibrated_model import parameter_name
from s2p_deploy.records.packed_weights import write_packed_weights
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table
from s2p_deploy.records.simulation import write_simulation
from s2p_deploy.records.timestep_table import write_timestep_table
from s2p_deploy.records.whole_files import write_tensors, write_text
from s2p_deploy.timesteps import angles_of_timesteps, spread_over_rows

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.calib.job import Job
    from s2p_deploy.calib.quantization.scale_start import StartingGrids
    from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
    from s2p_deploy.calib.start import Start
    from s2p_deploy.records import PackedWeight, TimestepTable, TimeTable, TransformSpec

WEIGHTS, WEIGHT_SCALES = "weights.safetensors", "weight_scales.safetensors"


@dataclass(frozen=True)
class Found:
    """What calibration found: a denoiser transformed by ``spec``, and its grids on the calibrated ``rows``."""

    denoiser: QuantizedDenoiser
    spec: TransformSpec
    rows: tuple[int, ...]
    grids: StartingGrids


@dataclass(frozen=True)
class Description:
    """What a CalibratedModel says besides its weights and their scales.

    ``denoiser`` is quantized as planned; it may be on the meta device. ``config`` is the diffusers configuration of its
    network. There is no ``time_table`` where the time features depend on the prompt too. ``act_scales`` are of every
    row of ``timesteps``.
    """

    denoiser: QuantizedDenoiser
    spec: TransformSpec
    config: dict[str, Any]
    time_table: TimeTable | None
    timesteps: TimestepTable
    act_scales: ScaleTable
    tokens: int


def write_model(folder: Path, job: Job, start: Start, found: Found) -> dict[str, Any]:
    """Writes the files that every CalibratedModel has; returns the part of the content that follows from them."""
    denoiser, rows, grids = found.denoiser, found.rows, found.grids
    timesteps = _timestep_table(start, rows)
    scales = spread_over_rows(grids.scales.numpy(), timesteps)
    packed = _low_bit_weights(denoiser)
    tokens = text_tokens(start.pipe, job.recipe.sampling.max_sequence_length)
    left_out = {parameter_name(f"{site}.weight") for site in packed}
    weights = {name: value for name, value in denoiser.hot_state().items() if name not in left_out}
    write_tensors(folder / WEIGHTS, weights)
    write_tensors(folder / WEIGHT_SCALES, denoiser.weight_scales())
    write_packed_weights(packed, folder / "low_bit.safetensors")
    if job.recipe.simulation_only:
        write_simulation(_simulation(grids, timesteps, scales), folder / "simulation.safetensors")
    described = Description(
        denoiser=denoiser,
        spec=found.spec,
        config=start.config,
        time_table=start.time_table,
        timesteps=timesteps,
        act_scales=ScaleTable(scales, denoiser.plan.point_names(), rows),
        tokens=tokens,
    )
    return write_description(folder, job, described)


def write_description(folder: Path, job: Job, described: Description) -> dict[str, Any]:
    """Writes all files but those of weights and their scales; returns the content that follows from them."""
    hot, table = described.denoiser.hot, described.time_table
    if table is not None:
        write_tensors(folder / "time_table.safetensors", {"time_projections": torch.from_numpy(table.projections)})
    write_scale_table(described.act_scales, folder / "act_scales.safetensors")
    write_timestep_table(described.timesteps, folder / "timesteps.json")
    write_plan(described.denoiser.plan, folder / "plan.yaml")
    write_text(folder / "denoiser_config.json", json.dumps(described.config, indent=1) + "\n")
    return {
        "time_slices": {name: list(columns) for name, columns in time_slices(hot).items()},
        "tokens": described.tokens,
        "added_cond": hot.added_width,
        "asked": {name: value for name, value in job.asked().items() if name != "recipe"},
        "average_bits": average_bits(described.denoiser, described.tokens),
        "transforms": described.spec.to_json(),
        "simulation_only": job.recipe.simulation_only,
    }


def _timestep_table(start: Start, rows: tuple[int, ...]) -> TimestepTable:
    """With those rows of the schedule that were calibrated."""
    calibrated = start.timesteps.timesteps[list(rows)].tolist()
    return replace(start.timesteps, calibrated=tuple(calibrated))


def _low_bit_weights(denoiser: QuantizedDenoiser) -> dict[str, PackedWeight]:
    """Codes of the sites with fewer than 16 levels; INT4 sites keep their float weight, from which training goes on."""
    return {site: weight for site, weight in packed_weights(denoiser).items() if weight.format != INT4.name}


def _simulation(grids: StartingGrids, timesteps: TimestepTable, scales: NDArray[np.float32]) -> Simulation:
    """Offsets of rows between calibrated ones interpolate over the angle, on each row's own grid.

    A row is relaxed where the nearest calibrated one at or below it is.
    """
    angles = angles_of_timesteps(timesteps.timesteps, timesteps)
    known = angles_of_timesteps(np.asarray(timesteps.calibrated), timesteps)
    offsets = np.zeros_like(scales)
    if grids.offsets is not None:
        columns = [np.interp(angles, known, column) for column in grids.offsets.double().numpy().T]
        offsets = scales * np.round(np.stack(columns, axis=1) / scales).astype(np.float32)
    relaxed = np.zeros(len(known), dtype=bool) if grids.relaxed is None else grids.relaxed.numpy()
    nearest = np.searchsorted(known, angles, side="right").clip(1) - 1
    return Simulation(offsets, tuple(np.flatnonzero(relaxed[nearest]).tolist()))
