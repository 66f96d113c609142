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
from s2p_deploy.calib import dataset_name, dataset_request, generate_dataset
from s2p_deploy.calib.samples import samples_at
from s2p_deploy.context import Context, silent
from s2p_deploy.engines import TorchRunner
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import denoiser_of, load_pipeline
from s2p_deploy.metrics import median_of, picks, pooled_sqnrs_db, resampled
from s2p_deploy.pipeline import Schedule, engine_denoiser, timesteps_of
from s2p_deploy.recipe import Sampling, recipe_from_data
from s2p_deploy.records import LatentDataset, Number, Skipped, open_artifact, write_artifact
from s2p_deploy.records.artifacts import MANIFEST
from s2p_deploy.records.files import write_text
from s2p_deploy.validation.compare import check_comparable, float_bytes
from s2p_deploy.validation.pictures import BATCH
from s2p_research.calibrate import calibrate, deployed_bytes, fake_quant_denoiser
from s2p_research.comparison import (
    Comparison,
    FailedRecipe,
    Gains,
    RecipeFigures,
    TimestepSqnr,
    read_recipe_figures,
    write_record,
)
from s2p_research.comparison_page import render_page
from s2p_research.comparison_pictures import ReferencePictures, Task, compare_pictures, draw_reference, label_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.context import Progress
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import CalibratedModel, PromptSet
    from s2p_research.comparison import PictureFigures
    from s2p_research.recipe import ResearchRecipe

JSON_FILE, PAGE_FILE = "comparison.json", "comparison.html"
_KIND = "RecipeResult"
_FIGURES = "figures.json"
_PICTURES = "pictures"
_POINTS_PER_CALL = 16
_ELEMENTS_PER_CALL = 2**14  # of latents: one of 64x64
_ALL_CALLS = 2000  # no schedule has more
_LIBRARIES = ("s2p-deploy", "torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class ComparisonConfig:
    """A comparison: the recipes, the prompts they are calibrated on, and the held-out prompts to draw.

    The recipes' own sampling is drawn first, then the further ``schedules``. SQNR is taken over the trajectories of the
    first ``latent_prompts`` held-out prompts.
    """

    base: BasePipeline
    recipes: tuple[ResearchRecipe, ...]
    train: PromptSet
    held_out: PromptSet
    schedules: tuple[Schedule, ...] = ()
    latent_prompts: int = 16

    @property
    def guidance_scale(self) -> float:
        """Returns the deployed guidance scale."""
        return self.recipes[0].sampling.guidance(self.base.default_guidance)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Lists what every recipe draws."""
        own = Schedule.of(self.recipes[0].sampling)
        return tuple(Task(self.held_out, schedule, self.guidance_scale) for schedule in (own, *self.schedules))


def compare(
    config: ComparisonConfig, out: Path, *, replace: bool = False, command: str = "", progress: Progress = silent
) -> Comparison:
    """Compares recipes and writes ``comparison.json`` and ``comparison.html`` to ``out``.

    A recipe that fails is reported as such, and the others go on. A second start goes on where the first one stopped.

    Args:
        config: what is compared.
        out: folder of everything: ``recipes/<name>/calib``, the floating-point pictures, the held-out latents, results.
        replace: whether to make everything anew.
        command: the command line, for the record.
        progress: told about every part.

    Raises:
        InputError: names of recipes repeat, their sampling differs, a held-out prompt is also a training prompt, or
            there is no such scheduler.
    """
    pipe = load_pipeline(config.base)
    _check(config, pipe)
    run = _Run(config, out, replace, progress, pipe)
    references = tuple(run.reference(task) for task in config.tasks)
    dataset = run.latents()
    results = tuple(_result_or_failure(run, recipe, references, dataset) for recipe in config.recipes)
    comparison = _comparison(run, references, results, command)
    pictures = {one.figures.name: one.folder / _PICTURES for one in results if isinstance(one, _Result)}
    write_record(comparison, out / JSON_FILE)
    (out / PAGE_FILE).write_text(render_page(comparison, references[0], pictures), encoding="utf-8")
    return comparison


@dataclass(frozen=True)
class _Result:
    """One recipe's figures, and the artifact with them and its pictures."""

    figures: RecipeFigures
    folder: Path


@dataclass(frozen=True)
class _Run:
    """A comparison that is under way, its folder, and the pipeline in floating point."""

    config: ComparisonConfig
    out: Path
    replace: bool
    progress: Progress
    pipe: DiffusionPipeline

    def reference(self, task: Task) -> ReferencePictures:
        """Opens or generates the floating-point pictures of a task."""
        base = self.config.base.base
        key = _key(base.digest, task.prompts.digest, asdict(task.schedule), task.guidance_scale, BATCH)
        folder = self.out / "reference" / f"{label_of(task.schedule)}-{key}"
        if self._is_finished(folder):
            return ReferencePictures.open(folder, task)
        return draw_reference(self.pipe, task, base, folder, self.progress)

    def latents(self) -> LatentDataset:
        """Opens or generates the held-out latents."""
        config = self.config
        prompts = config.held_out.first(config.latent_prompts)
        steps = config.recipes[0].sampling.steps
        sampling = Sampling(steps=steps, guidance_scale=config.guidance_scale)
        folder = self.out / "latents" / _key(config.base.base.digest, prompts.digest, sampling.model_dump())
        if self.replace:
            shutil.rmtree(folder, ignore_errors=True)
        return make_latents(config.base, prompts, sampling, folder, self.progress)

    def result(
        self, recipe: ResearchRecipe, references: tuple[ReferencePictures, ...], dataset: LatentDataset
    ) -> _Result:
        """Calibrates and measures a recipe, or opens an earlier result."""
        folder = self.out / "recipes" / _folder_name(recipe.name)
        calibrated, seconds = self._calibrated(recipe, folder)
        drawn = [reference.manifest.files for reference in references]
        out = folder / f"result-{_key(__version__, calibrated.manifest.digest, drawn, dataset.manifest.digest)}"
        if not self._is_finished(out):
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

    def _calibrated(self, recipe: ResearchRecipe, folder: Path) -> tuple[CalibratedModel, float | None]:
        """Calibrates a recipe; returns the model and its seconds, restarts included, if it was calibrated here."""
        out, clock = folder / "calib", folder / "seconds.json"
        folder.mkdir(parents=True, exist_ok=True)
        if self.replace and out.exists():
            clock.unlink(missing_ok=True)
        with nullcontext() if out.exists() and not self.replace else _timed(clock):
            found = calibrate(
                self.config.base,
                recipe,
                self.config.train,
                out,
                dataset=self.out / "datasets" / dataset_name(recipe),
                replace=self.replace,
                context=Context(progress=self._named_progress(recipe.name)),
            )
        return found, json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else None

    def _fill(
        self,
        folder: Path,
        recipe: ResearchRecipe,
        calibrated: CalibratedModel,
        seconds: float | None,
        references: tuple[ReferencePictures, ...],
        dataset: LatentDataset,
    ) -> dict[str, Any]:
        fake_quant = fake_quant_denoiser(calibrated)
        denoiser = engine_denoiser(TorchRunner(fake_quant), denoiser_of(self.pipe).config, calibrated.timesteps)
        progress = self._named_progress(recipe.name)
        (folder / _PICTURES).mkdir()
        keeps = (folder / _PICTURES, *[None] * (len(references) - 1))
        drawn = [
            compare_pictures(reference, self.pipe, denoiser, keep=keep, progress=progress)
            for reference, keep in zip(references, keeps, strict=True)
        ]
        content = calibrated.manifest.content
        figures = RecipeFigures(
            name=recipe.name,
            digest=recipe.digest(),
            average_bits={name: bits for name, bits in content["average_bits"].items() if isinstance(bits, dict)},
            size=deployed_bytes(calibrated),
            simulation_only=recipe.not_deployable,
            training={key: value for key, value in content.get("training", {}).items() if not _is_nested(value)},
            calibration_seconds=seconds,
            sqnr=sqnr_per_timestep(fake_quant, dataset, progress),
            pictures=tuple(drawn),
        )
        write_record(figures, folder / _FIGURES)
        return {}

    def _named_progress(self, what: str) -> Progress:
        return lambda stage, done, total: self.progress(f"{what}: {stage}", done, total)

    def _is_finished(self, folder: Path) -> bool:
        return not self.replace and (folder / MANIFEST).is_file()


def _result_or_failure(
    run: _Run, recipe: ResearchRecipe, references: tuple[ReferencePictures, ...], dataset: LatentDataset
) -> _Result | FailedRecipe:
    try:
        return run.result(recipe, references, dataset)
    except S2PError as error:
        return FailedRecipe(name=recipe.name, error=type(error).__name__, message=" ".join(str(error).split()))


def _check(config: ComparisonConfig, pipe: DiffusionPipeline) -> None:
    check_comparable(config.recipes, config.train, config.held_out)
    for schedule in config.schedules:
        timesteps = timesteps_of(pipe, schedule)
        if (timesteps != timesteps.round()).any():
            raise InputError(
                f"{schedule.scheduler} at {schedule.steps} steps asks for fractional timesteps: compare simulates "
                "the constant time table, which has none"
            )


def _comparison(
    run: _Run, references: tuple[ReferencePictures, ...], results: tuple[_Result | FailedRecipe, ...], command: str
) -> Comparison:
    config = run.config
    found = (one.figures for one in results if isinstance(one, _Result))
    first = next((figures for figures in found if figures.quantized), None)
    recipes = tuple(one if isinstance(one, FailedRecipe) else _with_gain(one.figures, first) for one in results)
    return Comparison(
        source=config.base.base.source,
        base=config.base.base.digest,
        size=float_bytes(denoiser_of(run.pipe)),
        guidance_scale=config.guidance_scale,
        train=config.train.digest,
        held_out=config.held_out.digest,
        pictures=len(config.held_out.prompts),
        latents=len(config.held_out.first(config.latent_prompts).prompts),
        floats=tuple(reference.figures() for reference in references),
        recipes=recipes,
        command=command,
        versions={name: metadata.version(name) for name in _LIBRARIES},
        threads=torch.get_num_threads(),
    )


def _with_gain(figures: RecipeFigures, first: RecipeFigures | None) -> RecipeFigures:
    """Adds how far a recipe's pictures are from those of the first recipe that quantizes."""
    if first is None or not figures.quantized:
        return figures
    pairs = zip(figures.pictures, first.pictures, strict=True)
    return figures.model_copy(update={"gains": tuple(_gains(mine, other) for mine, other in pairs)})


def _gains(mine: PictureFigures, other: PictureFigures) -> Gains:
    psnr, ssim, haarpsi = (
        median_of(np.subtract(getattr(mine, values), getattr(other, values)))
        for values in ("psnr_values", "ssim_values", "haarpsi_values")
    )
    return Gains(psnr=psnr, ssim=ssim, haarpsi=haarpsi, feature_distance=_difference_of_distances(mine, other))


def _difference_of_distances(mine: PictureFigures, other: PictureFigures) -> Number | None:
    """Computes the difference of two feature distances; its interval is of the same resamples of both."""
    own, others = mine.feature_distance, other.feature_distance
    if isinstance(own, Skipped) or isinstance(others, Skipped):
        return None
    if not (mine.resampled_distances and other.resampled_distances):
        return None
    again = np.subtract(mine.resampled_distances, other.resampled_distances)
    value = own.value - others.value
    return resampled(value, own.n, again - again.mean() + value)


def _is_nested(value: object) -> bool:
    """Tells whether a value of a summary is a whole curve, which the CalibratedModel keeps."""
    return isinstance(value, list | dict)


def _key(*parts: object) -> str:
    """Computes sixteen letters that identify what decides a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _folder_name(name: str) -> str:
    """Makes a folder's name of a recipe's name; with a digest where characters are left out."""
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
        write_text(file, json.dumps(before + time.perf_counter() - start))  # whole at any kill


def make_latents(
    base: BasePipeline, prompts: PromptSet, sampling: Sampling, out: Path, progress: Progress
) -> LatentDataset:
    """Generates all samples of the prompts' floating-point trajectories; opens them where they exist at ``out``."""
    data = {
        "name": "held-out latents",
        "weights": "none",
        "activations": "none",
        "sampling": sampling.model_dump(mode="json"),
        "dataset": {"prompts": len(prompts.prompts), "samples_per_prompt": _ALL_CALLS},
        "training": {"iterations": 0},
    }
    if out.exists():
        return LatentDataset.open(out)
    recipe = recipe_from_data(data, "held-out latents")

    def report(_stage: str, done: int, total: int) -> None:
        progress("held-out latents", done, total)

    return generate_dataset(dataset_request(base, recipe, prompts, out), context=Context(progress=report))


def sqnr_per_timestep(
    denoiser: Callable[..., torch.Tensor], dataset: LatentDataset, progress: Progress = silent
) -> TimestepSqnr:
    """Measures SQNR of a denoiser's predictions at every sample, pooled per timestep over prompts and both branches.

    The stored predictions are float16: nothing above some 70 dB can be distinguished.

    Args:
        denoiser: takes what an indexed denoiser takes.
        dataset: samples of every call of every prompt.
        progress: told after every batch.
    """
    indices, column = np.unique(dataset.timestep_indices, return_inverse=True)
    signal, noise = np.zeros((2, len(dataset.cond_text), len(indices)))
    size = max(1, min(_POINTS_PER_CALL, _ELEMENTS_PER_CALL // dataset.latents[0].size))
    for start in range(0, len(dataset.timestep_indices), size):
        some = np.arange(start, min(start + size, len(dataset.timestep_indices)))
        of_signal, of_noise = _powers(denoiser, dataset, some)
        place = dataset.prompt[some], column[some]
        np.add.at(signal, place, of_signal)
        np.add.at(noise, place, of_noise)
        progress("SQNR", int(some[-1]) + 1, len(dataset.timestep_indices))
    prompts = len(signal)
    times = np.stack([np.bincount(chosen, minlength=prompts) for chosen in picks(prompts)]).astype(np.float64)
    means = pooled_sqnrs_db(times @ signal, times @ noise).mean(1)
    db = pooled_sqnrs_db(signal.sum(0), noise.sum(0))
    mean = resampled(float(db.mean()), prompts, means)
    return TimestepSqnr(timestep_indices=tuple(indices.tolist()), db=tuple(db.tolist()), mean=mean)


def _powers(
    denoiser: Callable[..., torch.Tensor], dataset: LatentDataset, some: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Computes the energy of stored predictions and of the denoiser's error, float64 [samples], of both branches."""
    pairs = samples_at(dataset, some)
    with torch.no_grad():
        predicted = denoiser(*pairs.inputs(torch.arange(len(pairs.sample))))
    expected = pairs.output.double().numpy()
    return _energy(expected), _energy(predicted.numpy() - expected)


def _energy(both: NDArray[np.float64]) -> NDArray[np.float64]:
    energy: NDArray[np.float64] = np.square(both).reshape(2, len(both) // 2, -1).sum((0, 2))
    return energy
