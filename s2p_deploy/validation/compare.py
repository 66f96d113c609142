"""The stage: recipes side by side. Each is calibrated and measured alike; what is finished is never made twice.

Every intermediate result stands in a folder named after the digest of what decides it, so another request (more
pictures, one more schedule) finds what it shares with an earlier one and leaves the rest alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy import __version__
from s2p_deploy.calib import calibrate, dataset_name, fake_quant_denoiser
from s2p_deploy.engines import TorchRunner
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import denoiser_of, load_pipeline
from s2p_deploy.pipeline import Schedule, engine_denoiser, timesteps_of
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Sampling
from s2p_deploy.records import Comparison, FailedRecipe, RecipeFigures, open_artifact, write_artifact
from s2p_deploy.records.comparison import read_recipe_figures, write_record
from s2p_deploy.records.manifest import MANIFEST
from s2p_deploy.validation.compare_latents import make_latents, sqnr_per_row
from s2p_deploy.validation.compare_page import render_page
from s2p_deploy.validation.compare_pictures import (
    ReferencePictures,
    Task,
    compare_pictures,
    draw_reference,
    label_of,
)
from s2p_deploy.validation.compare_size import float_bytes, quantized_bytes
from s2p_deploy.validation.numbers import median_of
from s2p_deploy.validation.pictures import BATCH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import CalibratedModel, LatentDataset, PromptSet

JSON_FILE, PAGE_FILE = "comparison.json", "comparison.html"
_KIND = "RecipeResult"
_FIGURES = "figures.json"
_PICTURES = "pictures"
_LIBRARIES = ("s2p-deploy", "torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Contest:
    """What is compared, and on what: the recipes, the prompts they learn from, and the held-out prompts to draw.

    The recipes' own sampling is drawn first, then the further ``schedules``. SQNR is taken over the trajectories of the
    first ``latent_prompts`` held-out prompts.
    """

    base: BasePipeline
    recipes: tuple[Recipe, ...]
    train: PromptSet
    held_out: PromptSet
    schedules: tuple[Schedule, ...] = ()
    latent_prompts: int = 16

    @property
    def guidance_scale(self) -> float:
        """The deployed guidance."""
        return self.recipes[0].sampling.guidance_scale or self.base.default_guidance

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What every recipe draws."""
        own = Schedule.of(self.recipes[0].sampling)
        return tuple(Task(self.held_out, schedule, self.guidance_scale) for schedule in (own, *self.schedules))


def compare(
    contest: Contest, out: Path, *, replace: bool = False, command: str = "", progress: Progress = silent
) -> Comparison:
    """Compares recipes and writes ``comparison.json`` and ``comparison.html`` to ``out``.

    A recipe that fails is reported as such, and the others go on. A second start goes on where the first one stopped.

    Args:
        contest: what is compared.
        out: folder of everything: ``recipes/<name>/calib``, the floating-point pictures, the held-out latents, results.
        replace: whether to make everything anew.
        command: the command line, for the record.
        progress: told about every part.

    Raises:
        InputError: names of recipes repeat, their sampling differs, a held-out prompt is also a training prompt, or
            there is no such scheduler.
    """
    pipe = load_pipeline(contest.base)
    _check(contest, pipe)
    run = _Run(contest, out, replace, progress, pipe)
    references = tuple(run.reference(task) for task in contest.tasks)
    dataset = run.latents()
    results = tuple(_result_or_failure(run, recipe, references, dataset) for recipe in contest.recipes)
    comparison = _comparison(run, references, results, command)
    pictures = {one.figures.name: one.folder / _PICTURES for one in results if isinstance(one, _Result)}
    write_record(comparison, out / JSON_FILE)
    (out / PAGE_FILE).write_text(render_page(comparison, references[0], pictures), encoding="utf-8")
    return comparison


@dataclass(frozen=True)
class _Result:
    """One recipe's figures and the artifact that holds them and its pictures."""

    figures: RecipeFigures
    folder: Path


@dataclass(frozen=True)
class _Run:
    """A contest, where it is held, and the pipeline in floating point."""

    contest: Contest
    out: Path
    replace: bool
    progress: Progress
    pipe: DiffusionPipeline

    def reference(self, task: Task) -> ReferencePictures:
        """The floating-point pictures of a task, drawn once."""
        base = self.contest.base.base
        key = _key(base.digest, task.prompts.digest, asdict(task.schedule), task.guidance_scale, BATCH)
        folder = self.out / "reference" / f"{label_of(task.schedule)}-{key}"
        if self._stands(folder):
            return ReferencePictures.open(folder, task)
        return draw_reference(self.pipe, task, base, folder, self.progress)

    def latents(self) -> LatentDataset:
        """The held-out latents, walked once."""
        contest = self.contest
        prompts = contest.held_out.first(contest.latent_prompts)
        steps = contest.recipes[0].sampling.steps
        sampling = Sampling(steps=steps, guidance_scale=contest.guidance_scale)
        folder = self.out / "latents" / _key(contest.base.base.digest, prompts.digest, sampling.model_dump())
        if self.replace:
            shutil.rmtree(folder, ignore_errors=True)
        return make_latents(contest.base, prompts, sampling, folder, self.progress)

    def result(self, recipe: Recipe, references: tuple[ReferencePictures, ...], dataset: LatentDataset) -> _Result:
        """Calibrates and measures a recipe, or opens what was found before."""
        folder = self.out / "recipes" / _folder_name(recipe.name)
        calibrated, seconds = self._calibrated(recipe, folder)
        drawn = [reference.manifest.files for reference in references]
        out = folder / f"result-{_key(__version__, calibrated.manifest.digest, drawn, dataset.manifest.digest)}"
        if not self._stands(out):
            write_artifact(
                out,
                kind=_KIND,
                base=calibrated.manifest.base,
                recipe=calibrated.manifest.recipe,
                fill=lambda into: self._fill(into, recipe, calibrated, seconds, references, dataset),
                parents={"calib": (calibrated.folder, calibrated.manifest)},
                replace=True,
            )
        open_artifact(out, _KIND)
        return _Result(read_recipe_figures(out / _FIGURES), out)

    def _calibrated(self, recipe: Recipe, folder: Path) -> tuple[CalibratedModel, float | None]:
        """The calibrated model, and how long it took if it was made here, restarts included."""
        out, clock = folder / "calib", folder / "seconds.json"
        folder.mkdir(parents=True, exist_ok=True)
        if self.replace and out.exists():
            clock.unlink(missing_ok=True)
        with nullcontext() if out.exists() and not self.replace else _timed(clock):
            found = calibrate(
                self.contest.base,
                recipe,
                self.contest.train,
                out,
                dataset=self.out / "datasets" / dataset_name(recipe),
                replace=self.replace,
                progress=self._told(recipe.name),
            )
        return found, json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else None

    def _fill(
        self,
        folder: Path,
        recipe: Recipe,
        calibrated: CalibratedModel,
        seconds: float | None,
        references: tuple[ReferencePictures, ...],
        dataset: LatentDataset,
    ) -> dict[str, Any]:
        fake_quant = fake_quant_denoiser(calibrated)
        denoiser = engine_denoiser(TorchRunner(fake_quant), denoiser_of(self.pipe).config, calibrated.timesteps)
        told = self._told(recipe.name)
        (folder / _PICTURES).mkdir()
        keeps = (folder / _PICTURES, *[None] * (len(references) - 1))
        drawn = [
            compare_pictures(reference, self.pipe, denoiser, keep=keep, progress=told)
            for reference, keep in zip(references, keeps, strict=True)
        ]
        content = calibrated.manifest.content
        figures = RecipeFigures(
            name=recipe.name,
            digest=recipe.digest(),
            average_bits={name: bits for name, bits in content["average_bits"].items() if isinstance(bits, dict)},
            size=quantized_bytes(calibrated),
            simulation_only=recipe.simulation_only,
            training={key: value for key, value in content.get("training", {}).items() if not _is_nested(value)},
            calibration_seconds=seconds,
            sqnr=sqnr_per_row(fake_quant, dataset, told),
            pictures=tuple(drawn),
        )
        write_record(figures, folder / _FIGURES)
        return {}

    def _told(self, what: str) -> Progress:
        return lambda stage, done, total: self.progress(f"{what}: {stage}", done, total)

    def _stands(self, folder: Path) -> bool:
        return not self.replace and (folder / MANIFEST).is_file()


def _result_or_failure(
    run: _Run, recipe: Recipe, references: tuple[ReferencePictures, ...], dataset: LatentDataset
) -> _Result | FailedRecipe:
    try:
        return run.result(recipe, references, dataset)
    except S2PError as error:
        return FailedRecipe(name=recipe.name, error=type(error).__name__, message=" ".join(str(error).split()))


def _check(contest: Contest, pipe: DiffusionPipeline) -> None:
    names = [recipe.name for recipe in contest.recipes]
    for recipe in contest.recipes:
        if names.count(recipe.name) > 1:
            raise InputError(f"two recipes are named {recipe.name!r}: give one of them another name")
        if recipe.sampling != contest.recipes[0].sampling:
            raise InputError(
                f"recipes {names[0]!r} and {recipe.name!r} sample differently: set sampling.steps and"
                " sampling.guidance_scale for all of them"
            )
    for schedule in contest.schedules:
        timesteps = timesteps_of(pipe, schedule)
        if (timesteps != timesteps.round()).any():
            raise InputError(
                f"{schedule.scheduler} at {schedule.steps} steps asks for fractional timesteps: compare simulates "
                "the constant time table, which has none"
            )
    learnt = {prompt.text for prompt in contest.train.prompts}
    for prompt in contest.held_out.prompts:
        if prompt.text in learnt:
            raise InputError(f"held-out prompt {prompt.text!r} is also a training prompt: give other prompts")


def _comparison(
    run: _Run, references: tuple[ReferencePictures, ...], results: tuple[_Result | FailedRecipe, ...], command: str
) -> Comparison:
    contest = run.contest
    found = (one.figures for one in results if isinstance(one, _Result))
    first = next((figures for figures in found if figures.quantized), None)
    recipes = tuple(one if isinstance(one, FailedRecipe) else _with_gain(one.figures, first) for one in results)
    return Comparison(
        source=contest.base.base.source,
        base=contest.base.base.digest,
        size=float_bytes(denoiser_of(run.pipe)),
        guidance_scale=contest.guidance_scale,
        train=contest.train.digest,
        held_out=contest.held_out.digest,
        pictures=len(contest.held_out.prompts),
        latents=len(contest.held_out.first(contest.latent_prompts).prompts),
        floats=tuple(reference.figures() for reference in references),
        recipes=recipes,
        command=command,
        versions={name: metadata.version(name) for name in _LIBRARIES},
        threads=torch.get_num_threads(),
    )


def _with_gain(figures: RecipeFigures, first: RecipeFigures | None) -> RecipeFigures:
    """With the median of the paired differences of PSNR to the first recipe that quantizes."""
    if first is None or not figures.quantized:
        return figures
    pairs = zip(figures.pictures, first.pictures, strict=True)
    gain = tuple(median_of(np.subtract(mine.psnr_values, other.psnr_values)) for mine, other in pairs)
    return figures.model_copy(update={"psnr_gain": gain})


def _is_nested(value: object) -> bool:
    """Whether a value of a summary is a whole curve, which the CalibratedModel keeps."""
    return isinstance(value, list | dict)


def _key(*parts: object) -> str:
    """Sixteen letters that stand for what decides a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _folder_name(name: str) -> str:
    """A recipe's name where it can name a folder; otherwise what can be kept of it, and a digest."""
    if re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,80}", name, re.ASCII):
        return name
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:40].strip('-')}-{_key(name)}"


@contextmanager
def _timed(file: Path) -> Iterator[None]:
    """Adds the wall time in seconds of what is inside to a file, also where that fails."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else 0.0
    start = time.perf_counter()
    try:
        yield
    finally:
        file.write_text(json.dumps(before + time.perf_counter() - start), encoding="utf-8")
