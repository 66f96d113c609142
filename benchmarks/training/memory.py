"""What training takes of a GPU's memory at full size, counted on fake tensors: no GPU and no memory is needed.

Every pipeline's W4A8 training (one iteration by the project's own classes, second and later ones), its calls without
gradients, and what `calibrate` chooses or refuses on GPUs of several sizes. Not in it: the CUDA context, fragments,
workspaces of cuDNN, and what differs between kernels of a CPU and a GPU.

    python -m benchmarks.training.memory [--model sd14] [--out benchmarks/results/training_memory.json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.full_size.pipeline import ORIGINALS, TOKENS, Original
from s2p_deploy.calib.memory import GIB
from s2p_deploy.calib.plan import planned_layers, split_shortcuts
from s2p_deploy.calib.training_memory import Division, Network, TrainingAccount, fit_training
from s2p_deploy.errors import MissingEnvironmentError
from s2p_deploy.families import family_of_config, indexed_skeleton, network_config
from s2p_deploy.families.time_path import TimePath
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import TimestepTable, TimeTable

T5_TOKENS = 256  # of SD3
SIZES = (8, 24, 80)  # GiB
KINDS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"precision": "bf16"}, "adapters": {"adapter_rank": 16}}
BATCHES = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=ORIGINALS, action="append")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "training_memory.json")
    asked = parser.parse_args()
    found = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"models": {}}
    for name in asked.model or ORIGINALS:
        found["models"][name] = measure(network_of(ORIGINALS[name], "w4a8"))
        found["torch"] = torch.__version__
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found["models"][name], indent=1), flush=True)


def network_of(original: Original, recipe: str) -> Network:
    """Makes a pipeline's denoiser on the meta device, planned as a recipe says."""
    with torch.device("meta"):
        whole = original.denoiser(**original.config)
        config, slices = network_config(whole), TimePath(whole).slices
    family = family_of_config(config)
    conditioned = bool(family.added_width(config))
    table = TimeTable(np.zeros((1000, max(stop for _, stop in slices.values())), np.float32), slices)
    time_source = TimestepTable("none", {}, 1000, (0,), np.zeros(1000)) if conditioned else table
    loaded = Recipe.load(recipe)
    denoiser = indexed_skeleton(config, time_source).denoiser
    transforms = split_shortcuts(denoiser, loaded)
    transforms, _, plan = planned_layers(loaded, transforms, config, time_source, None)
    transforms.apply(denoiser)
    tokens = TOKENS + (T5_TOKENS if original.component == "transformer" else 0)
    return Network(denoiser, plan, tokens)


def measure(network: Network) -> dict[str, Any]:
    """Counts GiB of a network's training in every form, and what fits where."""
    start = time.perf_counter()
    training = Recipe.load("w4a8").training
    accounts = {kind: TrainingAccount(network, training.model_copy(update=changes)) for kind, changes in KINDS.items()}
    built = time.perf_counter() - start
    plain = accounts["fp32"]
    forms = [(kind, checkpointing) for kind in KINDS for checkpointing in (False, True)]
    start = time.perf_counter()
    peaks = {
        f"{kind}{', checkpointing' if checkpointing else ''}": {
            str(batch): rounded(accounts[kind].peak(Division(batch, 1, checkpointing=checkpointing)))
            for batch in BATCHES
        }
        for kind, checkpointing in forms
    }
    seconds = (time.perf_counter() - start) / len(forms) / len(BATCHES)
    return {
        "parameters_millions": round(sum(value.numel() for value in network.denoiser.parameters()) / 1e6),
        "weights": rounded(plain.weights),
        "gradients": rounded(plain.gradients),
        "kept": rounded(plain.kept),
        "peaks": peaks,
        "calls": {str(samples): rounded(plain.call(samples)) for samples in (1, 32)},
        "fits": {str(size): fit_or_refusal(plain, size * GIB) for size in SIZES},
        "seconds_to_build": round(built / len(KINDS), 1),
        "seconds_per_peak": round(seconds, 1),
    }


def fit_or_refusal(account: TrainingAccount, memory: int) -> dict[str, Any]:
    """Tells what `calibrate` chooses there, or the line with which it refuses."""
    try:
        fit = fit_training(account, memory)
    except MissingEnvironmentError as error:
        return {"refused": str(error)}
    return {"chosen": str(fit.division), "gib": rounded(fit.bytes)}


def rounded(size: int) -> float:
    return round(size / GIB, 2)


if __name__ == "__main__":
    main()
