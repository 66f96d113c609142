"""The first ten minutes on an NVIDIA GPU: eleven steps, each with the number that it should print beside the one found.

    python -m benchmarks.first_gpu --out first_gpu.jsonl [--device cuda:0] [--seconds 550] [--small] [--only STEP ...]

Each step runs in a process of its own under a time limit and writes one JSON line, the most valuable first, so that a
run that is cut short loses the least. PyTorch alone is needed, and what the package itself imports. ``--small`` is the
rehearsal: the same steps at small size, on any device. Expectations come from runs on a CPU and from
:mod:`benchmarks.training.memory`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import CalibratedModel

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
PROMPTS = "shapes:train"


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    small: bool
    work: Path

    def sync(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, run: Callable[[], object], repeats: int = 3) -> float:
        """Measures the seconds of the fastest run, after one that is not counted."""
        run()
        taken = []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            taken.append(time.perf_counter() - start)
        return min(taken)


def versions(setting: Setting) -> dict[str, Any]:
    """Step 0: what is there."""
    on_gpu = setting.device.type == "cuda"
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "small": setting.small}
    if on_gpu:
        found |= {
            "gpu": torch.cuda.get_device_name(setting.device),
            "capability": torch.cuda.get_device_capability(setting.device),
            "gib": round(torch.cuda.get_device_properties(setting.device).total_memory / GIB, 1),
            "cuda": torch.version.cuda,
        }
    return found


def placement(setting: Setting) -> dict[str, Any]:
    """Step 1: the tests that hold on the pretended device hold on this one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/placement/checks.py"],
        cwd=ROOT,
        env=os.environ | ({} if setting.device.type == "cpu" else {"PLACEMENT_DEVICE": str(setting.device)}),
        capture_output=True,
        text=True,
        check=False,
    )
    return {"code": done.returncode, "last_line": done.stdout.strip().splitlines()[-1:], "tail": done.stdout[-1500:]}


def _calibrated(
    setting: Setting, out: Path, iterations: int, *, stop_at: int = 0, deterministic: bool = False
) -> tuple[CalibratedModel, dict[str, float]]:
    """Calibrates the bundled pipeline in W4A8; returns the model and the seconds of each stage.

    Raises:
        KeyboardInterrupt: after ``stop_at`` iterations, where it is not 0; they are saved.
    """
    from s2p_deploy.api import as_prompts
    from s2p_deploy.calib import calibrate
    from s2p_deploy.context import Context
    from s2p_deploy.families import resolve_base
    from s2p_deploy.recipe import Recipe

    begun = time.perf_counter()
    starts = {"load": begun}

    def progress(stage: str, done: int, total: int) -> None:
        del total
        starts.setdefault(stage, time.perf_counter())
        if stop_at and (stage, done) == ("training", stop_at):
            raise KeyboardInterrupt

    small = {"dataset": {"prompts": 8, "samples_per_prompt": 4}, "sampling": {"steps": 6}} if setting.small else {}
    recipe = Recipe.load("w4a8", {"training": {"iterations": iterations}} | small)
    context = Context(device=str(setting.device), progress=progress, deterministic=deterministic)
    model = calibrate(resolve_base("shapes"), recipe, as_prompts(PROMPTS), out, context=context)
    ends = [*list(starts.values())[1:], time.perf_counter()]
    return model, {stage: round(end - start, 1) for (stage, start), end in zip(starts.items(), ends, strict=True)}


def calibration(setting: Setting) -> dict[str, Any]:
    """Step 2: the method works here, and how long each stage takes."""
    model, seconds = _calibrated(setting, setting.work / "calib", 6 if setting.small else 600)
    training = model.manifest.content["training"]
    mean = {when: sum(training[f"sqnr_db_{when}"]) / len(training[f"sqnr_db_{when}"]) for when in ("start", "final")}
    rate = training["iterations"] / max(0.1, seconds.get("training", 0.1))
    return {"seconds": seconds, "iterations_per_second": round(rate, 2)} | {
        f"sqnr_db_{when}": round(value, 2) for when, value in mean.items()
    }


def bits(setting: Setting) -> dict[str, Any]:
    """Step 3: whether a stopped run ends in the bits of a whole one, as it is and with ``deterministic``."""
    total, half = (4, 2) if setting.small else (40, 20)

    def files(name: str, *, deterministic: bool, stopped: bool = False) -> dict[str, str]:
        out = setting.work / f"{name}-{deterministic}"
        if stopped:
            with suppress(KeyboardInterrupt):
                _calibrated(setting, out, total, stop_at=half, deterministic=deterministic)
        return dict(_calibrated(setting, out, total, deterministic=deterministic)[0].manifest.files)

    found: dict[str, Any] = {}
    for deterministic in (False, True):
        start = time.perf_counter()
        whole = files("whole", deterministic=deterministic)
        name = "deterministic" if deterministic else "plain"
        found[name] = {
            "again_equal": whole == files("again", deterministic=deterministic),
            "resumed_equal": whole == files("resumed", deterministic=deterministic, stopped=True),
            "seconds": round(time.perf_counter() - start, 1),
        }
    return found


def _network(setting: Setting, name: str) -> IndexedDenoiser:
    """Makes a denoiser of full size with random weights, on the device."""
    from benchmarks.full_size.pipeline import ORIGINALS
    from s2p_deploy.families import indexed_denoiser, time_table_of
    from s2p_deploy.records import TimestepTable

    original = ORIGINALS[name]
    small = {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 768, "sample_size": 16}
    small |= {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    config = dict(original.config) | (small if setting.small else {})
    with setting.device:
        network = original.denoiser(**config)
    table = time_table_of(network, 1000)
    if table is None:
        import numpy as np

        source = TimestepTable("none", {}, 1000, tuple(map(float, range(1000))), np.linspace(0, 1.5, 1000))
        return indexed_denoiser(network, source).to(setting.device).eval()
    return indexed_denoiser(network, table).to(setting.device).eval()


def _training(setting: Setting, name: str, cases: tuple[tuple[int, bool], ...]) -> dict[str, Any]:
    """Measures peak GiB and seconds of an iteration by batch, with recomputed activations and without."""
    from benchmarks.training.cost import Case, random_batch, s2p_iteration

    found: dict[str, Any] = {}
    for batch, checkpointing in cases:
        torch.manual_seed(0)
        denoiser = _network(setting, name)
        inputs = random_batch(denoiser, Case(lambda: None, batch, 77)).to(setting.device)  # type: ignore[arg-type, return-value] # made already
        run = s2p_iteration(denoiser, inputs, {"batch": batch, "checkpointing": checkpointing}, setting.device)
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setting.device)
        seconds = setting.timed(run, 2)
        peak = torch.cuda.max_memory_allocated(setting.device) / GIB if setting.device.type == "cuda" else None
        key = f"batch {batch}{', checkpointing' if checkpointing else ''}"
        found[key] = {"gib": peak and round(peak, 2), "seconds": round(seconds, 3)}
        del denoiser, inputs, run
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _predicted(name: str) -> dict[str, Any]:
    """Returns the peak GiB by batch that a pipeline's training was counted to take."""
    counted = json.loads((ROOT / "benchmarks" / "results" / "training_memory.json").read_text(encoding="utf-8"))
    peaks = counted["models"][name]["peaks"]
    return {"gib": {kind: peaks[kind] for kind in ("fp32", "fp32, checkpointing")}}


def sd_memory(setting: Setting) -> dict[str, Any]:
    """Step 4: memory and time of training at SD v1-4's size."""
    return _training(setting, "sd14", ((1, False), (8, False), (1, True), (8, True)))


def sdxl_memory(setting: Setting) -> dict[str, Any]:
    """Step 5: memory and time of training at SDXL's size."""
    return _training(setting, "sdxl", ((1, True), (8, True)))


def walk(setting: Setting) -> dict[str, Any]:
    """Step 6: milliseconds of a call of 32 samples in float32, TF32 and float16, and how far the outputs are apart."""
    from s2p_deploy.context import Context
    from s2p_deploy.families import zero_inputs

    denoiser = _network(setting, "sd14").requires_grad_(requires_grad=False)
    inputs = [*zero_inputs(denoiser, tokens=77, batch=2 if setting.small else 32).arguments()]
    inputs[0], inputs[2] = torch.randn_like(inputs[0]), torch.randn_like(inputs[2])
    outputs, found = {}, {}
    for name in ("float32", "tf32", "float16"):
        given, network = inputs, denoiser
        if name == "float16":
            network = copy.deepcopy(denoiser).half()
            given = [value.half() if value.is_floating_point() else value for value in inputs]
        with torch.no_grad(), Context(tf32=name == "tf32").arithmetic():
            outputs[name] = network(*given).float()
            seconds = setting.timed(lambda network=network, given=given: network(*given))  # type: ignore[misc]
        difference = (outputs[name] - outputs["float32"]).norm() / outputs["float32"].norm()
        found[name] = {"ms": round(1000 * seconds, 1), "relative_difference": float(difference)}
    return found


def pictures(setting: Setting) -> dict[str, Any]:
    """Step 7: waits and milliseconds per step of a pipeline with a stand-in engine, by scheduler."""
    from s2p_deploy.pipeline import Schedule, generate

    stand_in = _stand_in(setting)
    pipe = stand_in.pipe_of(_small_model(setting))
    found: dict[str, Any] = {}
    for scheduler in ("ddim", "euler", "unipc"):
        waits, seconds = [], []
        for steps in (4, 12):
            schedule = Schedule(steps, scheduler)
            generate(pipe, stand_in.PROMPT, schedule=schedule, guidance_scale=3.0)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if setting.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                start = time.perf_counter()
                generate(pipe, stand_in.PROMPT, schedule=schedule, guidance_scale=3.0)
                setting.sync()
                seconds.append(time.perf_counter() - start)
                if setting.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
        found[scheduler] = {
            "waits_per_step": (waits[1] - waits[0]) / 8,
            "ms_per_step": round(1000 * (seconds[1] - seconds[0]) / 8, 2),
        }
    return found


def scales(setting: Setting) -> dict[str, Any]:
    """Step 8: starting scales here and on the CPU: seconds of each, and the largest relative difference."""
    from s2p_deploy.api import as_prompts
    from s2p_deploy.calib.calibrate import calibrate
    from s2p_deploy.context import Context
    from s2p_deploy.families import resolve_base
    from s2p_deploy.recipe import Recipe

    dataset = {"prompts": 4 if setting.small else 32, "samples_per_prompt": 4}
    recipe = Recipe.load("w8a8", {"dataset": dataset} | ({"sampling": {"steps": 6}} if setting.small else {}))
    tables, found = {}, {}
    for name in ("cpu", str(setting.device)):
        start = time.perf_counter()
        folder = setting.work / f"scales-{name.replace(':', '')}"
        context, shared = Context(device=name), setting.work / "scales-dataset"
        model = calibrate(
            resolve_base("shapes"), recipe, as_prompts(PROMPTS), folder, dataset=shared, context=context, replace=True
        )
        tables[name] = model.scales.scales
        found[f"seconds on {name}"] = round(time.perf_counter() - start, 1)
    first, second = tables.values() if len(tables) == 2 else (*tables.values(), *tables.values())
    return found | {"largest_relative_difference": float(abs(second / first - 1).max())}


def serving(setting: Setting) -> dict[str, Any]:
    """Step 9: four requests at once and alone: the largest difference of a picture's values."""
    stand_in = _stand_in(setting)
    pipe = stand_in.pipe_of(_small_model(setting))
    start = time.perf_counter()
    difference = stand_in.difference_of_shared_batches(pipe, steps=(3, 4, 5, 6))
    return {"largest_difference_lsb": int(difference), "seconds": round(time.perf_counter() - start, 1)}


def fused(setting: Setting) -> dict[str, Any]:
    """Step 10: fake quantization and its gradient, by the GPU's kernels and by PyTorch's operators."""
    from s2p_deploy.numerics import INT8, fake_quantize

    shape = (2, 32, 16, 16) if setting.small else (8, 320, 64, 64)
    x = torch.randn(shape, device=setting.device, requires_grad=True)
    scale = torch.full((shape[0], 1, 1, 1), 0.03, device=setting.device, requires_grad=True)

    def run() -> None:
        fake_quantize(x, scale, INT8).sum().backward()

    found: dict[str, Any] = {"kernels": {"ms": round(1000 * setting.timed(run), 3)}}
    with mock.patch("s2p_deploy.numerics.fake_quantize._kernels", return_value=None):
        found["operators"] = {"ms": round(1000 * setting.timed(run), 3)}
    with torch.no_grad():
        here = fake_quantize(x.cpu(), scale.cpu(), INT8)
        found["different_codes"] = int((fake_quantize(x, scale, INT8).cpu() != here).sum())
    return found


def _stand_in(setting: Setting) -> ModuleType:
    """Imports the placement tests' stand-in, for this device."""
    os.environ["PLACEMENT_DEVICE"] = str(setting.device)
    sys.path.insert(0, str(ROOT / "tests" / "placement"))
    return importlib.import_module("stand_in")


def _small_model(setting: Setting) -> CalibratedModel:
    small = Setting(setting.device, small=True, work=setting.work)
    return _calibrated(small, setting.work / "small", 0)[0]


# In the order of their value; expectations are for one H100 or H200. None: nobody knows yet.
STEPS: tuple[tuple[Callable[[Setting], dict[str, Any]], int, dict[str, Any]], ...] = (
    (versions, 30, {}),
    (placement, 120, {"code": 0}),
    (calibration, 120, {"sqnr_db_start": None, "sqnr_db_final": None}),
    (sd_memory, 120, _predicted("sd14")),
    (pictures, 60, {"waits_per_step": {"ddim": 0, "euler": 0, "unipc": 1}}),
    (bits, 60, {"plain": None, "deterministic": {"again_equal": True, "resumed_equal": True}}),
    (scales, 60, {"largest_relative_difference": 1e-6}),
    (sdxl_memory, 90, _predicted("sdxl")),
    (walk, 60, {}),
    (serving, 60, {"largest_difference_lsb": 1}),
    (fused, 60, {"different_codes": 0}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=550.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every step's time limit")
    parser.add_argument("--only", action="append", choices=[step.__name__ for step, _, _ in STEPS])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        return _run_here(asked)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + asked.seconds
    failed = 0
    for step, limit, expected in STEPS:
        name = step.__name__
        if asked.only and name not in asked.only:
            continue
        left = end - time.monotonic()
        line: dict[str, Any] = {"step": name, "expected": expected}
        if left < 5:
            line["error"] = "no time was left"
        else:
            line |= _in_a_process(name, asked, min(limit * asked.patience, left))
        failed += "error" in line
        with asked.out.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


def _in_a_process(name: str, asked: argparse.Namespace, limit: float) -> dict[str, Any]:
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.first_gpu", "--step", name, "--device", asked.device]
    command += ["--out", str(asked.out), *(["--small"] if asked.small else [])]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"did not end within {limit:.0f} s"}
    took = {"wall_seconds": round(time.monotonic() - start, 1)}
    if done.returncode:
        return took | {"error": done.stderr[-2000:]}
    return took | {"found": json.loads(done.stdout.strip().splitlines()[-1])}


def _run_here(asked: argparse.Namespace) -> int:
    step = next(step for step, _, _ in STEPS if step.__name__ == asked.step)
    with tempfile.TemporaryDirectory() as work:
        found = step(Setting(torch.device(asked.device), asked.small, Path(work)))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
