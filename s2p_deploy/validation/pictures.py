"""Pictures: two pipelines generate the same prompts from the same noise, and their pictures are compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.context import silent
from s2p_deploy.families import with_denoiser
from s2p_deploy.families.pictures import PictureInputs, pictures_of
from s2p_deploy.families.pipelines import task_of
from s2p_deploy.metrics import CPU, distance_of, haarpsi, psnr_db, ratio_of, relative_error, shifted, ssim, to_bytes
from s2p_deploy.pipeline import Schedule, call_arguments, noise_arguments, trained_size, with_schedule
from s2p_deploy.records import Number, Skipped
from s2p_deploy.shapes.checker import score_picture
from s2p_deploy.shapes.scenes import parse
from s2p_deploy.validation.measurements import PictureComparison, Similarity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.context import Progress
    from s2p_deploy.recipe import Sampling
    from s2p_deploy.records import Prompt, PromptSet

BATCH = 16
_SIDE = 64  # of the pictures that the checker and the classifier read
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))


@dataclass(frozen=True)
class GeneratedPictures:
    """Pictures that a pipeline generated, and the latents on the way.

    ``pictures`` float32 [n, H, W, 3] in [0, 1]; ``trajectory`` float32 [calls, n, C, H, W], the latents after each call
    of the denoiser; the scheduler's ``timesteps`` [calls]; wall ``seconds`` for all; ``inputs``, the pictures that were
    changed, where the pipeline inpaints or refines.
    """

    pictures: NDArray[np.float32]
    trajectory: NDArray[np.float32]
    timesteps: tuple[float, ...]
    seconds: float
    inputs: PictureInputs | None = None


@dataclass(frozen=True)
class PicturePairs:
    """Pictures uint8 [n, H, W, 3] of the FP pipeline and of the engine, and their prompts' texts."""

    texts: tuple[str, ...]
    reference: NDArray[np.uint8]
    candidate: NDArray[np.uint8]

    @staticmethod
    def of(prompts: PromptSet, reference: GeneratedPictures, candidate: GeneratedPictures) -> PicturePairs:
        """Rounds both pipelines' pictures of the same prompts to bytes."""
        texts = tuple(prompt.text for prompt in prompts.prompts)
        return PicturePairs(texts, to_bytes(reference.pictures), to_bytes(candidate.pictures))

    @staticmethod
    def read(folder: Path, texts: Sequence[str]) -> PicturePairs:
        """Reads what :meth:`write` wrote, one pair per text."""
        from PIL import Image

        def stacked(name: str) -> NDArray[np.uint8]:
            pictures = []
            for index in range(len(texts)):
                with Image.open(folder / f"{index:03d}-{name}.png") as opened:
                    pictures.append(np.asarray(opened.convert("RGB")))
            return np.stack(pictures)

        return PicturePairs(tuple(texts), stacked("fp"), stacked("engine"))

    def write(self, folder: Path) -> None:
        """Writes every picture of both as PNG: ``000-fp.png``, ``000-engine.png``, in the prompts' order."""
        from PIL import Image

        folder.mkdir()
        for name, pictures in (("fp", self.reference), ("engine", self.candidate)):
            for index, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / f"{index:03d}-{name}.png")


def generate_pictures(  # noqa: PLR0913 - what is drawn, how, and options by keyword
    pipe: DiffusionPipeline,
    prompts: PromptSet,
    schedule: Schedule,
    guidance_scale: float,
    *,
    inputs: PictureInputs | None = None,
    stage: str = "pictures",
    progress: Progress = silent,
) -> GeneratedPictures:
    """Generates a picture of every prompt from its own noise, in batches of :data:`BATCH`; ``pipe`` stays unchanged.

    ``inputs`` are the pictures that are changed, one per prompt, where the pipeline inpaints or refines.

    Raises:
        InputError: no such scheduler, or an engine's table does not cover the schedule.
    """
    batches = generate_batches(pipe, prompts, schedule, guidance_scale, inputs=inputs, stage=stage, progress=progress)
    return joined_pictures(list(batches), inputs)


def joined_pictures(parts: Sequence[GeneratedPictures], inputs: PictureInputs | None = None) -> GeneratedPictures:
    """Joins the batches of one schedule, at least one, which were made from ``inputs``."""
    return GeneratedPictures(
        np.concatenate([part.pictures for part in parts]),
        np.concatenate([part.trajectory for part in parts], axis=1),
        parts[0].timesteps,
        sum(part.seconds for part in parts),
        inputs,
    )


def generate_batches(  # noqa: PLR0913 - what is drawn, how, and options by keyword
    pipe: DiffusionPipeline,
    prompts: PromptSet,
    schedule: Schedule,
    guidance_scale: float,
    *,
    inputs: PictureInputs | None = None,
    stage: str = "pictures",
    progress: Progress = silent,
    skip: int = 0,
) -> Iterator[GeneratedPictures]:
    """Generates as :func:`generate_pictures`, one batch at a time, for what does not fit into memory together.

    The first ``skip`` batches are left out.
    """
    scheduled = with_schedule(pipe, schedule)
    total = len(prompts.prompts)
    for first in range(skip * BATCH, total, BATCH):
        some = prompts.prompts[first : first + BATCH]
        start = time.perf_counter()
        changed = None if inputs is None else inputs[first : first + BATCH]
        pictures, trajectory = _generate_batch(scheduled, some, schedule, guidance_scale, changed)
        seconds = time.perf_counter() - start
        timesteps = tuple(float(t) for t in scheduled.scheduler.timesteps[-len(trajectory) :])
        yield GeneratedPictures(pictures, trajectory, timesteps, seconds)
        progress(stage, first + len(some), total)  # behind what the caller does with the batch: it may keep it


def pictures_to_change(
    pipe: DiffusionPipeline,
    prompts: PromptSet,
    sampling: Sampling,
    drawn: Callable[[PictureInputs], GeneratedPictures],
) -> PictureInputs | None:
    """Draws the pictures that an inpainting pipeline or a refiner changes, and lays synthetic masks over them.

    They are those of ``sampling.pictures``, or ``pipe``'s own with everything masked, which ``drawn`` generates. None
    where a pipeline draws from text alone.

    Raises:
        InputError: ``sampling.pictures`` is missing, or draws none of this size.
    """
    if task_of(type(pipe).__name__) == "text-to-image":
        return None
    height, width = trained_size(pipe)
    if sampling.pictures is not None:
        pictures = pictures_of(sampling.pictures, prompts, sampling.steps, (height, width), pipe.device)
    else:
        found = drawn(PictureInputs.whole(len(prompts.prompts), height, width)).pictures
        pictures = torch.from_numpy(np.ascontiguousarray(found.transpose(0, 3, 1, 2)))
    return PictureInputs.masked(pictures, [prompt.noise_seed for prompt in prompts.prompts])


def compare_pictures(  # noqa: PLR0913 - what is compared, how it was drawn, and where
    reference: GeneratedPictures,
    candidate: GeneratedPictures,
    prompts: PromptSet,
    schedule: Schedule,
    guidance_scale: float,
    classifier: Path | None = None,
    *,
    device: torch.device = CPU,
) -> PictureComparison:
    """Compares two pipelines' pictures of the same prompts on ``device``; ``classifier`` is a file of weights."""
    pairs = list(zip(reference.trajectory, candidate.trajectory, strict=True))
    count = len(prompts.prompts)
    accuracy = accuracies(reference.pictures, candidate.pictures, prompts)
    if isinstance(accuracy, Skipped):
        distance: Number | Skipped = accuracy  # other pictures mean nothing to the classifier either
    else:
        distance = feature_distance(reference.pictures, candidate.pictures, classifier, device)
    return PictureComparison(
        schedule=schedule,
        guidance_scale=guidance_scale,
        similarity=similarity(reference.pictures, candidate.pictures, device),
        pixel_shift=pixel_shift(reference.pictures, device),
        timesteps=reference.timesteps,
        step_error=np.stack([relative_error(first, second) for first, second in pairs]),
        accuracy=accuracy,
        feature_distance=distance,
        seconds=(reference.seconds / count, candidate.seconds / count),
    )


def picture_psnr(
    base: DiffusionPipeline,
    reference: torch.nn.Module,
    candidate: torch.nn.Module,
    prompts: PromptSet,
    schedule: Schedule,
    guidance_scale: float,
) -> NDArray[np.float64]:
    """Computes PSNR float64 [n] in dB between the pictures of two denoisers in one pipeline."""
    pipes = [with_denoiser(base, denoiser) for denoiser in (reference, candidate)]
    first, second = (generate_pictures(pipe, prompts, schedule, guidance_scale).pictures for pipe in pipes)
    return psnr_db(first, second)


def similarity(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], device: torch.device = CPU
) -> Similarity:
    """Computes the picture metrics of [n, H, W, 3] on ``device``, a batch at a time."""
    batches = [slice(start, start + BATCH) for start in range(0, len(reference), BATCH)]
    metrics = (psnr_db, partial(ssim, device=device), partial(haarpsi, device=device))
    return Similarity(
        *(np.concatenate([metric(reference[some], candidate[some]) for some in batches]) for metric in metrics)
    )


def pixel_shift(pictures: NDArray[np.float32], device: torch.device = CPU) -> Similarity:
    """Scores pictures against themselves moved by one pixel, mean of the four directions: a yardstick."""
    found = [similarity(pictures, shifted(pictures, down, right), device) for down, right in _DIRECTIONS]
    return Similarity(*(np.mean([getattr(one, name) for one in found], axis=0) for name in ("psnr", "ssim", "haarpsi")))


def accuracies(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], prompts: PromptSet
) -> tuple[Number, Number] | Skipped:
    """Computes the attribute accuracy of both, where every prompt is a caption of the shapes grammar."""
    first, second = (attribute_scores(pictures, prompts) for pictures in (reference, candidate))
    if isinstance(first, Skipped) or isinstance(second, Skipped):
        return first if isinstance(first, Skipped) else Skipped("the two sets of pictures are of different sizes")
    return accuracy_of(first), accuracy_of(second)


def attribute_scores(pictures: NDArray[np.float32], prompts: PromptSet) -> NDArray[np.int64] | Skipped:
    """Counts the attributes that are right, and all of them, int64 [n, 2], of captions of the shapes grammar."""
    try:
        scenes = [parse(prompt.text) for prompt in prompts.prompts]
    except ValueError:
        return Skipped("the prompts are no captions of the shapes grammar")
    if pictures.shape[1:3] != (_SIDE, _SIDE):
        return Skipped(f"the checker reads pictures of {_SIDE}×{_SIDE}")
    scores = [score_picture(picture, scene) for picture, scene in zip(to_bytes(pictures), scenes, strict=True)]
    return np.array([(score.right, score.total) for score in scores], dtype=np.int64)


def accuracy_of(scores: NDArray[np.int64]) -> Number:
    """Computes the attribute accuracy of :func:`attribute_scores`."""
    return ratio_of(scores[:, 0], scores[:, 1])


def feature_distance(
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    classifier: Path | None,
    device: torch.device = CPU,
) -> Number | Skipped:
    """Computes the Frechet distance in the features of the shapes classifier: the offline stand-in for FID."""
    if classifier is None or not classifier.is_file():
        return Skipped("no classifier of the shapes pictures is given")
    return distance_of(*(picture_features(pictures, classifier, device) for pictures in (reference, candidate)))


def picture_features(
    pictures: NDArray[np.float32], classifier: Path, device: torch.device = CPU
) -> NDArray[np.float64]:
    """Computes features float64 [n, 64] of pictures of 64x64 by the shapes classifier, whose weights are in a file."""
    from s2p_deploy.shapes.classifier import load_classifier

    planes = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(device)
    with torch.no_grad():
        found: NDArray[np.float64] = load_classifier(classifier).to(device).features(planes).cpu().double().numpy()
    return found


def _generate_batch(
    pipe: DiffusionPipeline,
    prompts: Sequence[Prompt],
    schedule: Schedule,
    guidance_scale: float,
    inputs: PictureInputs | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    latents: list[NDArray[np.float32]] = []

    def keep(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].float().cpu().numpy().copy())
        return tensors

    result = pipe(
        **call_arguments(pipe, prompts, schedule, guidance_scale, inputs),
        **noise_arguments(pipe, [prompt.noise_seed for prompt in prompts]),
        callback_on_step_end=keep,
        output_type="np",
    )
    return result.images.astype(np.float32), np.stack(latents)
