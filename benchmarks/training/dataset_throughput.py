"""Dataset generation against its own denoiser: samples per second of both, measured in turns within one run.

    python -m benchmarks.training.dataset_throughput [--prompts 128] [--rounds 3] [--threads 1]

After every second batch of the dataset the bare denoiser runs one of the same size, and what that takes is no part of
the dataset's time: so a busy machine slows both alike. The dataset counts only samples that a prompt needs (two per
call of its walk); its time includes everything: texts, idle slots, scheduler steps, writing, merging, reading back.
Ratios are by the wall clock and by processor time. Writes benchmarks/results/dataset_throughput.json; exits 1
where the dataset reaches less than 0.9 of the bare denoiser by the wall clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2p_deploy.api import as_prompts
from s2p_deploy.calib import dataset_request, generate_dataset
from s2p_deploy.calib.trajectories import FloatPipeline, load_float_pipeline
from s2p_deploy.context import Context
from s2p_deploy.families import BasePipeline, resolve_base
from s2p_deploy.recipe import Recipe

BOUND = 0.9
RESULT = Path(__file__).parents[1] / "results" / "dataset_throughput.json"
STRATEGIES = {"eight samples per prompt": 8, "one sample per prompt": 1}


@dataclass(frozen=True)
class Moment:
    """Both clocks, in seconds."""

    wall: float
    processor: float

    @staticmethod
    def now() -> Moment:
        """The clocks' readings."""
        return Moment(time.perf_counter(), time.process_time())

    def __sub__(self, other: Moment) -> Moment:
        return Moment(self.wall - other.wall, self.processor - other.processor)

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.wall + other.wall, self.processor + other.processor)


class BareInBetween:
    """Progress of a dataset that runs the bare denoiser after every second batch."""

    def __init__(self, source: FloatPipeline, width: int) -> None:
        self.denoiser, self.width = source.denoiser, width
        batch = 2 * width
        self.inputs = (torch.randn(batch, 4, 8, 8), torch.full((batch,), 500), torch.randn(batch, 24, 128))
        self.steps = self.calls = 0
        self.spent = Moment(0, 0)

    @torch.no_grad()
    def __call__(self, _stage: str, done: int, _total: int) -> None:
        """Counts a dataset's samples, and takes its turn."""
        self.steps = done
        if done < (self.calls + 1) * 2 * self.width:
            return
        started = Moment.now()
        self.denoiser(*self.inputs)
        self.spent += Moment.now() - started
        self.calls += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = resolve_base("shapes")
    source = load_float_pipeline(base, Recipe.load("w4a8").sampling.steps)
    found = {}
    for name, samples in STRATEGIES.items():
        chosen = Recipe.load("w4a8", {"dataset": {"prompts": options.prompts, "samples_per_prompt": samples}})
        found[name] = summary(chosen, [measured(source, base, chosen) for _ in range(options.rounds)])
    result = {
        "pipeline": "shapes",
        "prompts": options.prompts,
        "threads": options.threads,
        "torch": torch.__version__,
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "bound": BOUND,
        "strategies": found,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if all(strategy["ratio"] >= BOUND for strategy in found.values()) else 1


def measured(source: FloatPipeline, base: BasePipeline, chosen: Recipe) -> tuple[Moment, Moment]:
    """Samples per second of the bare denoiser and of a whole dataset, by both clocks."""
    width = chosen.dataset.width
    bare = BareInBetween(source, width)
    with tempfile.TemporaryDirectory() as folder:
        request = dataset_request(base, chosen, as_prompts("shapes:train"), Path(folder) / "dataset")
        started = Moment.now()
        generate_dataset(request, source, context=Context(device="cpu", progress=bare))
        dataset = Moment.now() - started - bare.spent
    return rate(2 * width * bare.calls, bare.spent), rate(2 * bare.steps, dataset)


def rate(samples: int, spent: Moment) -> Moment:
    return Moment(samples / spent.wall, samples / spent.processor)


def summary(chosen: Recipe, rounds: list[tuple[Moment, Moment]]) -> dict[str, Any]:
    """Medians over the rounds; a ratio is that of one round."""
    ratios = [dataset.wall / bare.wall for bare, dataset in rounds]
    return {
        "width": chosen.dataset.width,
        "prompts_per_shard": chosen.dataset.prompts_per_shard,
        "bare_samples_per_s": round(statistics.median(bare.wall for bare, _ in rounds), 1),
        "dataset_samples_per_s": round(statistics.median(dataset.wall for _, dataset in rounds), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio_of_processor_time": round(statistics.median(d.processor / b.processor for b, d in rounds), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
