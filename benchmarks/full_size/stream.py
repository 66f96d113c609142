"""Streamed calibration at full size, random weights: seconds, peak memory and size, one form per process.

    python -m benchmarks.full_size.pipeline sdxl --out build/full_size/sdxl/pipeline
    python -m benchmarks.full_size.stream sdxl fp|w8a8|w4a8 [--work build/full_size]
    python -m benchmarks.full_size.single_file sdxl        # a model as one file, with text encoders of full size
    python -m benchmarks.full_size.stream sdxl w8a8 --single-file

Writes ``WORK/sdxl/model-FORM``, from which other scripts build graphs and engines, and its figures into
``results/full_size_stream.json``. A single file is converted first, into ``WORK/sdxl/cache``, as part of what is
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size.pipeline import MODELS, gigabytes
from s2p_deploy.calib import calibrate
from s2p_deploy.context import Context
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import Recipe

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp": ("fp", {}),
    "w8a8": ("ptq-stream", {}),
    "w4a8": ("ptq-stream", {"weights": "int4"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", choices=MODELS)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "full_size_stream.json")
    parser.add_argument("--single-file", action="store_true", help="of WORK/ORIGINAL/model.safetensors")
    asked = parser.parse_args()
    work, name = asked.work / asked.original, asked.form
    if asked.single_file:
        os.environ["S2P_CACHE"], name = str(work / "cache"), f"{name} of a single file"
    found = measure(work, asked.form, work / ("model.safetensors" if asked.single_file else "pipeline"))
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    known[asked.original] = known.get(asked.original, {}) | {name: found}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def measure(work: Path, form: str, source: Path) -> dict[str, Any]:
    """Calibrates one form of ``source`` into ``work/model-FORM``; finding the pipeline is part of it, as for users."""
    name, overrides = FORMS[form]
    recipe = Recipe.load(name, overrides)
    stages = _Stages()
    before, start, used = peak_gb(), time.perf_counter(), time.process_time()
    base = resolve_base(str(source))
    stages("digest of the pipeline", 1, 1)  # and the conversion of a single file
    made = calibrate(
        base, recipe, None, work / f"model-{form}", replace=True, context=Context(device="cpu", progress=stages)
    )
    return {
        "recipe": name,
        "weights": recipe.weights,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "stage_seconds": {stage: round(seconds, 1) for stage, seconds in stages.seconds.items()},
        "peak_memory_gb": round(peak_gb(), 2),
        "peak_memory_before_gb": round(before, 2),
        "pipeline_gb": gigabytes(base.folder),
        "calibrated_model_gb": gigabytes(made.folder),
    }


class _Stages:
    """A progress that notes how long each stage took, from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
