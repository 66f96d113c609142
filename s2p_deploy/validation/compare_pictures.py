"""Pictures of many recipes against one drawing in floating point, a batch at a time: memory does not grow with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from s2p_deploy.families import with_denoiser
from s2p_deploy.pipeline import Schedule
from s2p_deploy.records import (
    FloatFigures,
    Number,
    PictureFigures,
    PromptSet,
    Skipped,
    Spread,
    StepErrors,
    open_artifact,
    write_artifact,
)
from s2p_deploy.shapes.classifier import CLASSIFIER
from s2p_deploy.validation.distances import distance_of
from s2p_deploy.validation.measurements import Similarity
from s2p_deploy.validation.metrics import relative_error
from s2p_deploy.validation.numbers import mean_of, median_of, quantile_of
from s2p_deploy.validation.pictures import (
    BATCH,
    Drawing,
    accuracy_of,
    attribute_answers,
    draw_parts,
    picture_features,
    pixel_shift,
    similarity,
    to_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.progress import Progress
    from s2p_deploy.records import Base, Manifest

KIND = "ReferencePictures"
_SCORES = "scores.safetensors"
_METRICS = ("psnr", "ssim", "haarpsi")


@dataclass(frozen=True)
class Task:
    """What is drawn, by whichever denoiser."""

    prompts: PromptSet
    schedule: Schedule
    guidance_scale: float

    def batch(self, number: int) -> PromptSet:
        """The prompts of one batch."""
        return PromptSet(self.prompts.prompts[number * BATCH : (number + 1) * BATCH])


@dataclass(frozen=True)
class Answers:
    """What the checker and the classifier of the shapes say: int64 [n, 2] right and asked, float64 [n, 64] features."""

    attributes: NDArray[np.int64]
    features: NDArray[np.float64]


@dataclass(frozen=True)
class ReferencePictures:
    """The floating-point pictures of a task on disk, a file per batch, and what they score by themselves."""

    folder: Path
    manifest: Manifest
    task: Task
    pixel_shift: Similarity
    answers: Answers | Skipped

    @staticmethod
    def open(folder: Path, task: Task) -> ReferencePictures:
        """Verifies and reads them; the pictures stay on disk until asked for."""
        manifest = open_artifact(folder, KIND)
        scores = load_file(folder / _SCORES)
        reason = manifest.content["no_answers"]
        answers = Skipped(reason) if reason else Answers(scores["attributes"], scores["features"])
        return ReferencePictures(folder, manifest, task, Similarity(*(scores[name] for name in _METRICS)), answers)

    def parts(self) -> Iterator[Drawing]:
        """One batch after the other."""
        timesteps = tuple(self.manifest.content["timesteps"])
        for name in sorted(name for name in self.manifest.files if name.startswith("part-")):
            stored = load_file(self.folder / name)
            yield Drawing(stored["pictures"], stored["trajectory"], timesteps, 0.0)

    def figures(self) -> FloatFigures:
        """Their own figures."""
        return FloatFigures(
            scheduler=self.task.schedule.scheduler,
            steps=self.task.schedule.steps,
            pixel_shift={
                "psnr": median_of(self.pixel_shift.psnr),
                "ssim": median_of(self.pixel_shift.ssim),
                "haarpsi": median_of(self.pixel_shift.haarpsi),
            },
            accuracy=self.answers if isinstance(self.answers, Skipped) else accuracy_of(self.answers.attributes),
            seconds=self.manifest.content["seconds"],
        )


def draw_reference(pipe: DiffusionPipeline, task: Task, base: Base, out: Path, progress: Progress) -> ReferencePictures:
    """Draws a task with the pipeline as it is, and writes it to ``out``."""

    def fill(folder: Path) -> dict[str, Any]:
        shifts: list[Similarity] = []
        answers: list[Answers | Skipped] = []
        seconds: list[float] = []
        stage = f"pictures, FP, {label_of(task.schedule)}"
        drawn = draw_parts(pipe, task.prompts, task.schedule, task.guidance_scale, stage=stage, progress=progress)
        for number, part in enumerate(drawn):
            # safetensors writes memory as it lies, and pictures come as a transposed view
            stored = {name: np.ascontiguousarray(getattr(part, name)) for name in ("pictures", "trajectory")}
            save_file(stored, folder / f"part-{number:05d}.safetensors")
            shifts.append(pixel_shift(part.pictures))
            answers.append(_answers(part.pictures, task.batch(number)))
            seconds.append(part.seconds)
        together = _joined_answers(answers)
        scores: dict[str, NDArray[Any]] = asdict(_joined(shifts))
        if isinstance(together, Answers):
            scores |= asdict(together)
        save_file(scores, folder / _SCORES)
        return {
            "seconds": sum(seconds) / len(task.prompts.prompts),
            "timesteps": list(part.timesteps),
            "no_answers": together.reason if isinstance(together, Skipped) else "",
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
    """Draws the reference's task with another denoiser in ``pipe``, and compares picture by picture.

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
    drawn = draw_parts(other, task.prompts, task.schedule, task.guidance_scale, stage=stage, progress=progress)
    parts: list[_Part] = []
    for number, (expected, found) in enumerate(zip(reference.parts(), drawn, strict=True)):
        parts.append(_compared(expected, found, task.batch(number)))
        if keep is not None:
            _write_pictures(found.pictures, keep, number * BATCH)
    return _figures(parts, reference, len(task.prompts.prompts))


def label_of(schedule: Schedule) -> str:
    """A schedule as one word, which may name a folder."""
    return f"{schedule.scheduler or 'own'}-{schedule.steps}"


@dataclass(frozen=True)
class _Part:
    """What is kept of one batch: numbers per picture."""

    similar: Similarity
    step_error: NDArray[np.float64]
    answers: Answers | Skipped
    timesteps: tuple[float, ...]
    seconds: float


def _compared(expected: Drawing, found: Drawing, prompts: PromptSet) -> _Part:
    steps = zip(expected.trajectory, found.trajectory, strict=True)
    return _Part(
        similarity(expected.pictures, found.pictures),
        np.stack([relative_error(first, second) for first, second in steps]),
        _answers(found.pictures, prompts),
        found.timesteps,
        found.seconds,
    )


def _figures(parts: Sequence[_Part], reference: ReferencePictures, count: int) -> PictureFigures:
    similar = _joined([part.similar for part in parts])
    errors = np.quantile(np.concatenate([part.step_error for part in parts], 1), (0.1, 0.5, 0.9), axis=1)
    low, median, high = (tuple(line.tolist()) for line in errors)
    answers = _joined_answers([part.answers for part in parts])
    return PictureFigures(
        psnr=_spread(similar.psnr),
        ssim=_spread(similar.ssim),
        haarpsi=_spread(similar.haarpsi),
        feature_distance=_distance(reference.answers, answers),
        accuracy=answers if isinstance(answers, Skipped) else accuracy_of(answers.attributes),
        step_error=StepErrors(timesteps=parts[0].timesteps, low=low, median=median, high=high),
        seconds=sum(part.seconds for part in parts) / count,
        psnr_values=tuple(similar.psnr.tolist()),
    )


def _spread(values: NDArray[np.float64]) -> Spread:
    return Spread(
        median=median_of(values), mean=mean_of(values), tenth=quantile_of(values, 0.1), worst=float(values.min())
    )


def _distance(reference: Answers | Skipped, candidate: Answers | Skipped) -> Number | Skipped:
    """Distance of the features, where both have some."""
    if isinstance(reference, Skipped) or isinstance(candidate, Skipped):
        return reference if isinstance(reference, Skipped) else Skipped("these pictures have no features")
    return distance_of(reference.features, candidate.features)


def _answers(pictures: NDArray[np.float32], prompts: PromptSet) -> Answers | Skipped:
    """Pictures that are no shapes say nothing to the classifier either."""
    found = attribute_answers(np.nan_to_num(pictures), prompts)
    return found if isinstance(found, Skipped) else Answers(found, picture_features(pictures, CLASSIFIER))


def _joined_answers(parts: Sequence[Answers | Skipped]) -> Answers | Skipped:
    """Those of all batches, or why one of them has none."""
    there = [part for part in parts if isinstance(part, Answers)]
    if len(there) < len(parts):
        return next(part for part in parts if isinstance(part, Skipped))
    return Answers(*(np.concatenate([getattr(one, name) for one in there]) for name in ("attributes", "features")))


def _joined(parts: Sequence[Similarity]) -> Similarity:
    return Similarity(*(np.concatenate([getattr(one, name) for one in parts]) for name in _METRICS))


def _write_pictures(pictures: NDArray[np.float32], folder: Path, first: int) -> None:
    from PIL import Image

    for number, picture in enumerate(to_bytes(np.nan_to_num(pictures)), first):
        Image.fromarray(picture).save(folder / f"{number:05d}.png")
