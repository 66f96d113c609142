"""Pictures of many recipes against one set in floating point, a batch at a time: memory does not grow with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from s2p_deploy.families import with_denoiser
from s2p_deploy.metrics import (
    distance_of,
    mean_of,
    median_of,
    quantile_of,
    relative_error,
    resampled_distances,
    to_bytes,
)
from s2p_deploy.pipeline import Schedule
from s2p_deploy.records import Number, PromptSet, Skipped, open_artifact, write_artifact
from s2p_deploy.shapes.classifier import CLASSIFIER
from s2p_deploy.validation.measurements import Similarity
from s2p_deploy.validation.pictures import (
    BATCH,
    GeneratedPictures,
    accuracy_of,
    attribute_scores,
    generate_batches,
    picture_features,
    pixel_shift,
    similarity,
)
from s2p_research.comparison import FloatFigures, PictureFigures, Spread, StepErrors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.context import Progress
    from s2p_deploy.records import Base, Manifest

KIND = "ReferencePictures"
_SCORES = "scores.safetensors"
_METRICS = ("psnr", "ssim", "haarpsi")


@dataclass(frozen=True)
class Task:
    """A task for any denoiser: prompts, schedule and guidance."""

    prompts: PromptSet
    schedule: Schedule
    guidance_scale: float

    def batch(self, number: int) -> PromptSet:
        """Returns the prompts of one batch."""
        return PromptSet(self.prompts.prompts[number * BATCH : (number + 1) * BATCH])


@dataclass(frozen=True)
class ShapeScores:
    """Readings of the shapes checker, int64 [n, 2] (right, asked), and of the classifier, features float64 [n, 64]."""

    attributes: NDArray[np.int64]
    features: NDArray[np.float64]


@dataclass(frozen=True)
class ReferencePictures:
    """The floating-point pictures of a task on disk, a file per batch, and what they score by themselves."""

    folder: Path
    manifest: Manifest
    task: Task
    pixel_shift: Similarity
    scores: ShapeScores | Skipped

    @staticmethod
    def open(folder: Path, task: Task) -> ReferencePictures:
        """Verifies and reads them; the pictures stay on disk until asked for."""
        manifest = open_artifact(folder, KIND)
        stored = load_file(folder / _SCORES)
        reason = manifest.content["no_scores"]
        scores = Skipped(reason) if reason else ShapeScores(stored["attributes"], stored["features"])
        return ReferencePictures(folder, manifest, task, Similarity(*(stored[name] for name in _METRICS)), scores)

    def parts(self) -> Iterator[GeneratedPictures]:
        """Yields one batch after the other."""
        timesteps = tuple(self.manifest.content["timesteps"])
        for name in sorted(name for name in self.manifest.files if name.startswith("part-")):
            stored = load_file(self.folder / name)
            yield GeneratedPictures(stored["pictures"], stored["trajectory"], timesteps, 0.0)

    def figures(self) -> FloatFigures:
        """Summarizes them by themselves."""
        return FloatFigures(
            scheduler=self.task.schedule.scheduler,
            steps=self.task.schedule.steps,
            pixel_shift={
                "psnr": median_of(self.pixel_shift.psnr),
                "ssim": median_of(self.pixel_shift.ssim),
                "haarpsi": median_of(self.pixel_shift.haarpsi),
            },
            accuracy=self.scores if isinstance(self.scores, Skipped) else accuracy_of(self.scores.attributes),
            seconds=self.manifest.content["seconds"],
        )


def draw_reference(pipe: DiffusionPipeline, task: Task, base: Base, out: Path, progress: Progress) -> ReferencePictures:
    """Generates a task's pictures with the pipeline as it is, and writes it to ``out``."""

    def fill(folder: Path) -> dict[str, Any]:
        shifts: list[Similarity] = []
        scores: list[ShapeScores | Skipped] = []
        seconds: list[float] = []
        stage = f"pictures, FP, {label_of(task.schedule)}"
        drawn = generate_batches(pipe, task.prompts, task.schedule, task.guidance_scale, stage=stage, progress=progress)
        for number, part in enumerate(drawn):
            # safetensors writes memory as it lies, and pictures come as a transposed view
            stored = {name: np.ascontiguousarray(getattr(part, name)) for name in ("pictures", "trajectory")}
            save_file(stored, folder / f"part-{number:05d}.safetensors")
            shifts.append(pixel_shift(part.pictures))
            scores.append(_shape_scores(part.pictures, task.batch(number)))
            seconds.append(part.seconds)
        together = _joined_scores(scores)
        arrays: dict[str, NDArray[Any]] = asdict(_joined(shifts))
        if isinstance(together, ShapeScores):
            arrays |= asdict(together)
        save_file(arrays, folder / _SCORES)
        return {
            "seconds": sum(seconds) / len(task.prompts.prompts),
            "timesteps": list(part.timesteps),
            "no_scores": together.reason if isinstance(together, Skipped) else "",
        }

    write_artifact(out, kind=KIND, base=base, recipe={}, fill=fill, replace=True)
    return ReferencePictures.open(out, task)


def compare_pictures(
    reference: ReferencePictures,
    pipe: DiffusionPipeline,
    denoiser: torch.nn.Module,
    *,
    keep: Path | None,
    progress: Progress,
) -> PictureFigures:
    """Generates the reference's task with another denoiser in ``pipe``, and compares picture by picture.

    Args:
        reference: the floating-point pictures.
        pipe: the stock pipeline that drew them; left as it is.
        denoiser: called as diffusers calls a UNet.
        keep: a folder that gets every picture as PNG, by the number of its prompt (None: none is kept).
        progress: told after every batch.

    Raises:
        InputError: the denoiser's table does not cover the schedule.
    """
    task = reference.task
    other, stage = with_denoiser(pipe, denoiser), f"pictures, {label_of(task.schedule)}"
    drawn = generate_batches(other, task.prompts, task.schedule, task.guidance_scale, stage=stage, progress=progress)
    parts: list[_Part] = []
    for number, (expected, found) in enumerate(zip(reference.parts(), drawn, strict=True)):
        parts.append(_compared(expected, found, task.batch(number)))
        if keep is not None:
            _write_pictures(found.pictures, keep, number * BATCH)
    return _figures(parts, reference, len(task.prompts.prompts))


def label_of(schedule: Schedule) -> str:
    """Names a schedule as one word, which may name a folder."""
    return f"{schedule.scheduler or 'own'}-{schedule.steps}"


@dataclass(frozen=True)
class _Part:
    """One batch's numbers per picture."""

    similar: Similarity
    step_error: NDArray[np.float64]
    scores: ShapeScores | Skipped
    timesteps: tuple[float, ...]
    seconds: float


def _compared(expected: GeneratedPictures, found: GeneratedPictures, prompts: PromptSet) -> _Part:
    steps = zip(expected.trajectory, found.trajectory, strict=True)
    return _Part(
        similarity(expected.pictures, found.pictures),
        np.stack([relative_error(first, second) for first, second in steps]),
        _shape_scores(found.pictures, prompts),
        found.timesteps,
        found.seconds,
    )


def _figures(parts: Sequence[_Part], reference: ReferencePictures, count: int) -> PictureFigures:
    similar = _joined([part.similar for part in parts])
    errors = np.quantile(np.concatenate([part.step_error for part in parts], 1), (0.1, 0.5, 0.9), axis=1)
    low, median, high = (tuple(line.tolist()) for line in errors)
    scores = _joined_scores([part.scores for part in parts])
    return PictureFigures(
        psnr=_spread(similar.psnr),
        ssim=_spread(similar.ssim),
        haarpsi=_spread(similar.haarpsi),
        feature_distance=_distance(reference.scores, scores),
        accuracy=scores if isinstance(scores, Skipped) else accuracy_of(scores.attributes),
        step_error=StepErrors(timesteps=parts[0].timesteps, low=low, median=median, high=high),
        seconds=sum(part.seconds for part in parts) / count,
        psnr_values=tuple(similar.psnr.tolist()),
        ssim_values=tuple(similar.ssim.tolist()),
        haarpsi_values=tuple(similar.haarpsi.tolist()),
        resampled_distances=_resampled_distances(reference.scores, scores),
    )


def _spread(values: NDArray[np.float64]) -> Spread:
    return Spread(
        median=median_of(values), mean=mean_of(values), tenth=quantile_of(values, 0.1), worst=float(values.min())
    )


def _distance(reference: ShapeScores | Skipped, candidate: ShapeScores | Skipped) -> Number | Skipped:
    """Computes the distance of the features, where both have some."""
    if isinstance(reference, Skipped) or isinstance(candidate, Skipped):
        return reference if isinstance(reference, Skipped) else Skipped("these pictures have no features")
    return distance_of(reference.features, candidate.features)


def _resampled_distances(reference: ShapeScores | Skipped, candidate: ShapeScores | Skipped) -> tuple[float, ...]:
    """Computes the distances of resamples, where both have finite features."""
    if isinstance(reference, Skipped) or isinstance(candidate, Skipped) or len(reference.features) < 2:
        return ()
    both = reference.features, candidate.features
    return tuple(resampled_distances(*both).tolist()) if all(np.isfinite(one).all() for one in both) else ()


def _shape_scores(pictures: NDArray[np.float32], prompts: PromptSet) -> ShapeScores | Skipped:
    """Scores pictures of shapes; other pictures mean nothing to the classifier."""
    found = attribute_scores(np.nan_to_num(pictures), prompts)
    return found if isinstance(found, Skipped) else ShapeScores(found, picture_features(pictures, CLASSIFIER))


def _joined_scores(parts: Sequence[ShapeScores | Skipped]) -> ShapeScores | Skipped:
    """Joins those of all batches, or says why one of them has none."""
    there = [part for part in parts if isinstance(part, ShapeScores)]
    if len(there) < len(parts):
        return next(part for part in parts if isinstance(part, Skipped))
    return ShapeScores(*(np.concatenate([getattr(one, name) for one in there]) for name in ("attributes", "features")))


def _joined(parts: Sequence[Similarity]) -> Similarity:
    return Similarity(*(np.concatenate([getattr(one, name) for one in parts]) for name in _METRICS))


def _write_pictures(pictures: NDArray[np.float32], folder: Path, first: int) -> None:
    from PIL import Image

    for number, picture in enumerate(to_bytes(np.nan_to_num(pictures)), first):
        Image.fromarray(picture).save(folder / f"{number:05d}.png")
