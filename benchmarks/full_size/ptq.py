"""Recipe ``ptq`` at Stable Diffusion v1-4's size, random weights: time, peak memory and size of what it writes.

    python -m benchmarks.full_size.ptq ptq [--work build/full_size] [--steps 4]

``ptq`` is the recipe as it ships. The other forms are what ``full_size/engines.py`` builds engines from, where values
do not matter: ``fp``, and ``w8a8`` and ``w4a8`` with scales from the largest magnitudes, found sooner, and
``w8a8-unshifted`` without ``transforms.shift``. One form per process, so that the peak is its own; those that quantize
share one dataset.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size.pipeline import gigabytes, write_pipeline
from s2p_deploy.calib import calibrate
from s2p_deploy.context import Context
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Prompt, PromptSet

_SOON: dict[str, Any] = {"scales": {"weights": "max", "activations": "max", "latents": 1}}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ptq": ("ptq", {}),
    "fp": ("fp", {}),
    "w8a8": ("ptq", _SOON),
    "w4a8": ("ptq", _SOON | {"weights": "int4"}),
    "w8a8-unshifted": ("ptq", _SOON | {"transforms": {"shift": "none"}}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "full_size_ptq.json")
    asked = parser.parse_args()
    pipeline = asked.work / "pipeline"
    if not pipeline.exists():
        write_pipeline(pipeline)
    found = measure(asked.form, asked.work, asked.steps)
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(known | {asked.form: found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def measure(form: str, work: Path, steps: int) -> dict[str, Any]:
    """Calibrates one form into ``work/model-FORM``; processor time counts where the machine is shared."""
    name, overrides = FORMS[form]
    small = {"sampling": {"steps": steps}, "dataset": {"prompts": 1, "width": 1}}
    recipe = Recipe.load(name, small | overrides)
    stages = _Stages()
    before, start, used = peak_gb(), time.perf_counter(), time.process_time()
    made = calibrate(
        resolve_base(str(work / "pipeline")),
        recipe,
        PromptSet((Prompt("p", "a red circle"),)),
        work / f"model-{form}",
        dataset=None if recipe.is_float else work / "dataset",
        replace=True,
        context=Context(device="cpu", progress=stages),
    )
    return {
        "recipe": name,
        "weights": recipe.weights,
        "steps": steps,
        "prompts": 1,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "stage_seconds": stages.seconds,
        "peak_memory_gb": round(peak_gb(), 2),
        "peak_memory_before_gb": round(before, 2),
        "unet_gb": gigabytes(work / "pipeline" / "unet"),
        "calibrated_model_gb": gigabytes(made.folder),
    }


class _Stages:
    """A progress that notes when each stage was first and last heard of."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._started.setdefault(stage, now), 1)
        print(f"{stage} {done}/{total} ({self.seconds[stage]} s)", flush=True)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
