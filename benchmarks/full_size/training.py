"""S2P training at Stable Diffusion v1-4's size: seconds per iteration and memory, on random weights.

Values do not matter for either. One sample per batch and recomputed activations on the CPU; the paper's batch of 12 on
a GPU. The estimate for the paper's 10,000 iterations stands beside its 4.5 hours (one A100).

    python -m benchmarks.full_size.training [--iterations 3] [--batch 1] [--device cpu] [--precision fp32]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.full_size.pipeline import SD_V1
from benchmarks.training.cost import Case, random_batch, s2p_iteration
from s2p_deploy.families import indexed_denoiser, time_table_of

PAPER = {"iterations": 10_000, "batch": 12, "hours": 4.5, "hardware": "one A100"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "full_size_training.json")
    asked = parser.parse_args()
    training = {"precision": asked.precision, "checkpointing": True, "batch": asked.batch}
    found = measure(training, asked.iterations, torch.device(asked.device))
    on_cpu = asked.device == "cpu"  # where the machine is shared, processor time says more than wall time
    seconds = found["processor_seconds_per_iteration"] / found["threads"] if on_cpu else found["seconds_per_iteration"]
    hours = seconds / asked.batch * PAPER["batch"] * PAPER["iterations"] / 3600
    result = vars(asked) | {"out": None} | found | {"paper": PAPER, "hours_for_the_papers_iterations": round(hours, 1)}
    del result["out"]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def measure(training: dict[str, Any], iterations: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of the iterations after the first, and the process's peak memory."""
    torch.manual_seed(0)
    start = time.perf_counter()
    unet = UNet2DConditionModel(**SD_V1)
    float_denoiser = indexed_denoiser(unet, time_table_of(unet, 1000)).eval()
    batch = random_batch(float_denoiser, Case(lambda: unet, training["batch"], 77)).to(device)
    run = s2p_iteration(float_denoiser, batch, training, device)
    built = time.perf_counter() - start
    seconds, processor = [], []
    for _ in range(iterations + 1):
        start, used = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {
        "parameters": sum(parameter.numel() for parameter in float_denoiser.parameters()),
        "threads": torch.get_num_threads(),
        "seconds_to_build": round(built, 1),
        "seconds_per_iteration": round(statistics.median(seconds[1:]), 2),
        "processor_seconds_per_iteration": round(statistics.median(processor[1:]), 2),
        "peak_memory_gb": round(_peak_bytes(device) / 1e9, 2),
    }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
