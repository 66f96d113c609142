"""One engine on other schedules, without a rebuild, against engines that were calibrated for each of them.

    python -m benchmarks.engines.rescheduled_engines WORK_FOLDER [--recipe w8a8] [--pictures 64] [--set KEY=VALUE ...]

The bundled pipeline, calibrated on its own 50 PNDM steps and built for OpenVINO in both forms of the time table. Each
schedule is drawn in floating point, by that engine, and by an engine calibrated for it: same recipe and prompts, the
pipeline's scheduler replaced. Calibration walks integer timesteps only, so the comparator of Euler with Karras sigmas
is calibrated on DPM++ 2M with Karras sigmas. What stands in WORK_FOLDER is used again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.api import as_prompts
from s2p_deploy.calib import calibrate
from s2p_deploy.cli.options import overrides_from_settings
from s2p_deploy.engines import BuildOptions, ShapeProfile, build_engine, load_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline, load_pipeline, load_time_path, resolve_base
from s2p_deploy.metrics import median_of, psnr_db
from s2p_deploy.pipeline import Schedule, pipeline_with_engine, timesteps_of
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, ExportedGraph
from s2p_deploy.schedulers import scheduler_by_name
from s2p_deploy.timesteps import scale_origins
from s2p_deploy.validation.pictures import BATCH, generate_pictures

if TYPE_CHECKING:
    import numpy as np
    from diffusers import StableDiffusionPipeline

    from s2p_deploy.records import PromptSet

Form = Literal["constant", "input"]
BACKEND, BOUND_DB = "openvino", 1.5
OWN = Schedule(50, "pndm")


@dataclass(frozen=True)
class Case:
    """A schedule, the form of the engine that runs it, and what its comparator is calibrated on."""

    schedule: Schedule
    form: Form
    comparator: Schedule


CASES = (
    Case(Schedule(25, "pndm"), "constant", Schedule(25, "pndm")),
    Case(Schedule(20, "dpm++2m"), "constant", Schedule(20, "dpm++2m")),
    Case(Schedule(10, "unipc"), "constant", Schedule(10, "unipc")),
    Case(Schedule(20, "euler-karras"), "input", Schedule(20, "dpm++2m-karras")),
)


@dataclass(frozen=True)
class Bench:
    """The artifacts in a folder, made where they are missing, and the pictures of the first held-out prompts."""

    folder: Path
    recipe: str
    settings: tuple[str, ...]
    drawn: PromptSet

    @cached_property
    def pipe(self) -> StableDiffusionPipeline:
        """The bundled pipeline in floating point."""
        return load_pipeline(resolve_base("shapes"))

    def engine(self, calibrated_for: Schedule, form: Form) -> Engine:
        """The engine of a model that was calibrated on a schedule."""
        base, out = self._base(calibrated_for), self.folder / self.recipe / _name(calibrated_for)
        # a finished model of the same request is left as it is, one of another is refused
        model = calibrate(base, self._recipe(calibrated_for), as_prompts("shapes:train"), out / "calib")
        graph_folder, engine_folder = out / f"graph-{form}", out / f"engine-{form}"
        if not graph_folder.exists():
            path = load_time_path(base) if form == "input" else None
            export_graph(model, graph_folder, time_table=form, time_path=path)
        if not engine_folder.exists():
            options = BuildOptions(profile=ShapeProfile(1, 2 * BATCH, 2 * BATCH))
            build_engine(ExportedGraph.open(graph_folder), engine_folder, backend=BACKEND, options=options)
        return Engine.open(engine_folder)

    def pictures(self, schedule: Schedule, engine: Engine | None = None) -> np.ndarray:
        """What the pipeline draws on a schedule, in floating point or by an engine."""
        guidance = self._recipe(schedule).sampling.guidance(resolve_base("shapes").default_guidance)
        if engine is None:
            return generate_pictures(self.pipe, self.drawn, schedule, guidance).pictures
        with load_engine(engine, schedules=[timesteps_of(self.pipe, schedule)]) as runner:
            return generate_pictures(
                pipeline_with_engine(self.pipe, engine, runner), self.drawn, schedule, guidance
            ).pictures

    def _recipe(self, schedule: Schedule) -> Recipe:
        return Recipe.load(self.recipe, overrides_from_settings([*self.settings, f"sampling.steps={schedule.steps}"]))

    def _base(self, schedule: Schedule) -> BasePipeline:
        """The bundled pipeline with another scheduler, in a folder of its own."""
        out = self.folder / "pipelines" / str(schedule.scheduler)
        if not out.exists():
            source = resolve_base("shapes").folder
            scheduler = scheduler_by_name(str(schedule.scheduler), self.pipe.scheduler)
            partial = out.with_name(f"{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial, ignore=shutil.ignore_patterns("scheduler"))
            scheduler.save_pretrained(partial / "scheduler")
            index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
            index["scheduler"] = ["diffusers", type(scheduler).__name__]
            (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            partial.rename(out)
        return resolve_base(str(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipe", default="w8a8", help="w8a8 or w4a8")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--set", action="append", dest="settings", default=[], help="KEY=VALUE of the recipe, for all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "rescheduled_engines.json")
    asked = parser.parse_args()
    drawn = as_prompts("shapes:held_out").first(asked.pictures)
    bench = Bench(asked.work, asked.recipe, tuple(asked.settings), drawn)
    stored = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    described = {"backend": BACKEND, "pictures": asked.pictures, "settings": asked.settings, "bound_db": BOUND_DB}
    rows = []
    for case in CASES:
        rows.append(compared(bench, case))
        stored[asked.recipe] = described | {"rows": rows}
        asked.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(stored[asked.recipe], indent=1))


def compared(bench: Bench, case: Case) -> dict[str, Any]:
    """Median PSNR in dB to the floating-point pictures, of the re-scheduled engine and of its comparator."""
    engine, other = bench.engine(OWN, case.form), bench.engine(case.comparator, case.form)
    reference = bench.pictures(case.schedule)
    first, second = (psnr_db(reference, bench.pictures(case.schedule, one)) for one in (engine, other))
    rescheduled, calibrated = median_of(first), median_of(second)
    origins = scale_origins(timesteps_of(bench.pipe, case.schedule), engine.timesteps)
    return {
        "schedule": _name(case.schedule),
        "form": case.form,
        "scales": str(origins),
        "rescheduled_psnr": [round(value, 2) for value in (rescheduled.value, rescheduled.low, rescheduled.high)],
        "comparator": _name(case.comparator),
        "comparator_psnr": [round(value, 2) for value in (calibrated.value, calibrated.low, calibrated.high)],
        "loss_db": round(calibrated.value - rescheduled.value, 2),
        "within_bound": bool(calibrated.value - rescheduled.value <= BOUND_DB),
    }


def _name(schedule: Schedule) -> str:
    return f"{schedule.scheduler}-{schedule.steps}"


if __name__ == "__main__":
    main()
