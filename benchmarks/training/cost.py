"""What an S2P iteration costs beside a plain forward and backward pass of the same network at the same batch.

Both run alternately in one process, in float32 on the CPU: the bundled UNet, and a UNet of one block of Stable
Diffusion v1-4's first resolution (320 channels, 64x64 latents) with its text-conditioned attention. An S2P iteration is
the quantized forward and backward pass, clipping and all updates; the one with features adds the teacher's forward pass
and the loss over blocks. Times are the process's CPU seconds (robust on a shared machine) and wall seconds, medians.

    python -m benchmarks.training.cost [--rounds 5] [--case bundled] [--out benchmarks/results/training_cost.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel

from s2p_deploy.calib.learner import Learner
from s2p_deploy.calib.losses import Objective, OutputLoss, TimestepErrors
from s2p_deploy.calib.plan import plan_from_recipe
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
from s2p_deploy.calib.samples import Batch
from s2p_deploy.calib.starting_scales import starting_weight_scales
from s2p_deploy.calib.training import TrainingSetting
from s2p_deploy.calib.training_state import ActScales, TrainingState
from s2p_deploy.families import (
    IndexedDenoiser,
    discover_layers,
    indexed_denoiser,
    load_pipeline,
    resolve_base,
    time_table_of,
    zero_inputs,
)
from s2p_deploy.recipe import Recipe, Scales

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 50
CPU = torch.device("cpu")
LIMITS = {"s2p": 1.45, "s2p_features": 2.2}
SD_BLOCK = {
    "sample_size": 64,
    "block_out_channels": (320,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@dataclass(frozen=True)
class Case:
    """A network and how it is fed: ``batch`` samples with ``tokens`` of text."""

    unet: Callable[[], UNet2DConditionModel]
    batch: int
    tokens: int


CASES = {
    "bundled": Case(lambda: load_pipeline(resolve_base("shapes")).unet, 32, 24),
    "sd14_block": Case(lambda: UNet2DConditionModel(**SD_BLOCK), 1, 77),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "training_cost.json")
    asked = parser.parse_args()
    found = {name: measure(CASES[name], asked.rounds) for name in asked.case or CASES}
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"limits": LIMITS, "machine": machine, "rounds": asked.rounds, "cases": found}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Medians of CPU and wall seconds of each kind of iteration, and the ratios of the CPU seconds."""
    torch.manual_seed(0)
    unet = case.unet()
    float_denoiser = indexed_denoiser(unet, time_table_of(unet, 1000)).eval()
    batch = random_batch(float_denoiser, case)
    kinds = {
        "plain": plain_iteration(copy.deepcopy(float_denoiser), batch),
        "s2p": s2p_iteration(copy.deepcopy(float_denoiser), batch, {}),
        "s2p_features": s2p_iteration(float_denoiser, batch, {"features": {"targets": "blocks"}}),
    }
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):
        for kind, run in kinds.items():
            start = time.process_time(), time.perf_counter()
            run()
            times[kind].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    cpu = {kind: statistics.median(taken[0] for taken in runs[1:]) for kind, runs in times.items()}
    wall = {kind: statistics.median(taken[1] for taken in runs[1:]) for kind, runs in times.items()}
    ratios = {kind: round(cpu[kind] / cpu["plain"], 3) for kind in LIMITS}
    return {"batch": case.batch, "cpu_seconds": cpu, "wall_seconds": wall, "ratios": ratios}


def random_batch(float_denoiser: IndexedDenoiser, case: Case) -> Batch:
    """Noise on random rows: the values do not matter for the time."""
    given = zero_inputs(float_denoiser, tokens=case.tokens, batch=case.batch)
    index = torch.randint(ROWS, (case.batch,))
    sample, texts, added_cond, target = map(
        torch.randn_like, (given.sample, given.encoder_hidden_states, given.added_cond, given.sample)
    )
    return Batch(sample, index * (1000 // ROWS), index, texts, added_cond, target)


def plain_iteration(float_denoiser: IndexedDenoiser, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        float_denoiser.zero_grad()
        (float_denoiser(*batch.inputs()) - batch.target).square().mean().backward()

    return run


def s2p_iteration(
    float_denoiser: IndexedDenoiser, batch: Batch, training: dict[str, Any], device: torch.device = CPU
) -> Callable[[], None]:
    """W4A8 as the preset says, but for ``training``; weights start at their largest magnitude, which is found fast."""
    recipe = Recipe.load("w4a8", {"training": training})
    float_denoiser.to(device)
    watched = recipe.training.features.targets != "none"
    teacher = copy.deepcopy(float_denoiser).requires_grad_(requires_grad=False) if watched else None
    plan = plan_from_recipe(recipe, discover_layers(float_denoiser))
    denoiser = QuantizedDenoiser(
        float_denoiser, plan, starting_weight_scales(float_denoiser, plan, Scales(weights="max"))
    )
    static = [not point.timestep_dependent for point in plan.activation_quantizers]
    act_scales = ActScales(torch.full((ROWS, len(plan.activation_quantizers)), 0.05), static)
    state = TrainingState(denoiser, act_scales, torch.arange(ROWS) * (1000 // ROWS))
    state.modules().to(device)
    setting = TrainingSetting(recipe.training, OutputLoss(recipe.training), teacher=teacher)
    learner = Learner(state, setting)
    learner.begin(TimestepErrors(*torch.ones(2, ROWS)))
    objective = Objective(setting, state, torch.ones(ROWS))

    def run() -> None:
        learner.clear_gradients()
        learner.update(batch.position.unique(), 1.0, *objective.add_gradients(batch, 1.0))

    return run


if __name__ == "__main__":
    main()
