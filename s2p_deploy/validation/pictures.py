"""Question 3: are the pictures the same? Two pipelines draw the same prompts from the same noise."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.families import denoiser_of, with_denoiser
from s2p_deploy.pipeline import Schedule, call_arguments, initial_noise, with_schedule
from s2p_deploy.progress import silent
from s2p_deploy.shapes.checker import score_picture
from s2p_deploy.shapes.grammar import parse
from s2p_deploy.validation.distances import distance_of
from s2p_deploy.validation.measurements import PictureComparison, Similarity
from s2p_deploy.validation.metrics import haarpsi, psnr_db, relative_error, shifted, ssim
from s2p_deploy.validation.numbers import Number, Skipped, ratio_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.progress import Progress
    from s2p_deploy.records import Prompt, PromptSet

BATCH = 16
_SIDE = 64  # of the pictures that the checker and the classifier read
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))


@dataclass(frozen=True)
class Drawing:
    """What a pipeline drew, and how it came there.

    ``pictures`` float32 [n, H, W, 3] in [0, 1]; ``trajectory`` float32 [calls, n, C, H, W], the latents after each call
    of the denoiser; the scheduler's ``timesteps`` [calls]; wall ``seconds`` for all.
    """

    pictures: NDArray[np.float32]
    trajectory: NDArray[np.float32]
    timesteps: tuple[float, ...]
    seconds: float


def draw(
    pipe: DiffusionPipeline,
    prompts: PromptSet,
    schedule: Schedule,
    guidance_scale: float,
    *,
    stage: str = "pictures",
    progress: Progress = silent,
) -> Drawing:
    """Draws every prompt from its own noise, in batches of :data:`BATCH`. ``pipe`` is left as it is.

    Raises:
        InputError: no such scheduler, or an engine's table does not cover the schedule.
    """
    return joined_drawing(list(draw_parts(pipe, prompts, schedule, guidance_scale, stage=stage, progress=progress)))


def joined_drawing(parts: Sequence[Drawing]) -> Drawing:
    """The drawings of one schedule's batches, at least one, as one."""
    return Drawing(
        np.concatenate([part.pictures for part in parts]),
        np.concatenate([part.trajectory for part in parts], axis=1),
        parts[0].timesteps,
        sum(part.seconds for part in parts),
    )


def draw_parts(  # noqa: PLR0913 - what is drawn, how, and options by keyword
    pipe: DiffusionPipeline,
    prompts: PromptSet,
    schedule: Schedule,
    guidance_scale: float,
    *,
    stage: str = "pictures",
    progress: Progress = silent,
    drawn: int = 0,
) -> Iterator[Drawing]:
    """As :func:`draw`, one batch after the other, for what does not fit into memory together.

    The first ``drawn`` batches are left out.
    """
    scheduled = with_schedule(pipe, schedule)
    total = len(prompts.prompts)
    for first in range(drawn * BATCH, total, BATCH):
        some = prompts.prompts[first : first + BATCH]
        start = time.perf_counter()
        pictures, trajectory = _draw_batch(scheduled, some, schedule, guidance_scale)
        seconds = time.perf_counter() - start
        yield Drawing(pictures, trajectory, tuple(float(t) for t in scheduled.scheduler.timesteps), seconds)
        progress(stage, first + len(some), total)  # behind what the caller does with the batch: it may keep it


def compare_drawings(
    reference: Drawing,
    candidate: Drawing,
    prompts: PromptSet,
    schedule: Schedule,
    guidance_scale: float,
    classifier: Path | None = None,
) -> PictureComparison:
    """All that two drawings of the same prompts say about each other; ``classifier``: weights of the features."""
    pairs = list(zip(reference.trajectory, candidate.trajectory, strict=True))
    count = len(prompts.prompts)
    accuracy = accuracies(reference.pictures, candidate.pictures, prompts)
    if isinstance(accuracy, Skipped):
        distance: Number | Skipped = accuracy  # pictures of another kind say nothing to the classifier either
    else:
        distance = feature_distance(reference.pictures, candidate.pictures, classifier)
    return PictureComparison(
        schedule=schedule,
        guidance_scale=guidance_scale,
        similarity=similarity(reference.pictures, candidate.pictures),
        pixel_shift=pixel_shift(reference.pictures),
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
    """PSNR float64 [n] in dB between the pictures of two denoisers (as diffusers calls them) in the same pipeline."""
    pipes = [with_denoiser(base, denoiser) for denoiser in (reference, candidate)]
    first, second = (draw(pipe, prompts, schedule, guidance_scale).pictures for pipe in pipes)
    return psnr_db(first, second)


def similarity(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> Similarity:
    """Picture metrics of pictures [n, H, W, 3]."""
    return Similarity(psnr_db(reference, candidate), ssim(reference, candidate), haarpsi(reference, candidate))


def pixel_shift(pictures: NDArray[np.float32]) -> Similarity:
    """What pictures score against themselves moved by one pixel, mean of the four directions: a yardstick."""
    found = [similarity(pictures, shifted(pictures, down, right)) for down, right in _DIRECTIONS]
    return Similarity(*(np.mean([getattr(one, name) for one in found], axis=0) for name in ("psnr", "ssim", "haarpsi")))


def accuracies(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], prompts: PromptSet
) -> tuple[Number, Number] | Skipped:
    """Attribute accuracy of both, where every prompt is a caption of the shapes grammar."""
    first, second = (attribute_answers(pictures, prompts) for pictures in (reference, candidate))
    if isinstance(first, Skipped) or isinstance(second, Skipped):
        return first if isinstance(first, Skipped) else Skipped("the two drawings are of different sizes")
    return accuracy_of(first), accuracy_of(second)


def attribute_answers(pictures: NDArray[np.float32], prompts: PromptSet) -> NDArray[np.int64] | Skipped:
    """Right answers and questions asked, int64 [n, 2], where every prompt is a caption of the shapes grammar."""
    try:
        scenes = [parse(prompt.text) for prompt in prompts.prompts]
    except ValueError:
        return Skipped("the prompts are no captions of the shapes grammar")
    if pictures.shape[1:3] != (_SIDE, _SIDE):
        return Skipped(f"the checker reads pictures of {_SIDE}×{_SIDE}")
    scores = [score_picture(picture, scene) for picture, scene in zip(to_bytes(pictures), scenes, strict=True)]
    return np.array([(score.right, score.asked) for score in scores], dtype=np.int64)


def accuracy_of(answers: NDArray[np.int64]) -> Number:
    """Attribute accuracy of what :func:`attribute_answers` gave."""
    return ratio_of(answers[:, 0], answers[:, 1])


def feature_distance(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], classifier: Path | None
) -> Number | Skipped:
    """Frechet distance in the features of the shapes classifier: the offline stand-in for FID."""
    if classifier is None or not classifier.is_file():
        return Skipped("no classifier of the shapes pictures is given")
    return distance_of(*(picture_features(pictures, classifier) for pictures in (reference, candidate)))


def picture_features(pictures: NDArray[np.float32], classifier: Path) -> NDArray[np.float64]:
    """Features float64 [n, 64] of pictures of 64x64 by the shapes classifier, whose weights are in a file."""
    from s2p_deploy.shapes.classifier import load_classifier

    planes = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        found: NDArray[np.float64] = load_classifier(classifier).features(planes).double().numpy()
    return found


def to_bytes(pictures: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pictures uint8 [n, H, W, 3], rounded as diffusers does."""
    rounded: NDArray[np.uint8] = (pictures * 255).round().clip(0, 255).astype(np.uint8)
    return rounded


def _draw_batch(
    pipe: DiffusionPipeline, prompts: Sequence[Prompt], schedule: Schedule, guidance_scale: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    latents: list[NDArray[np.float32]] = []

    def keep(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].float().cpu().numpy().copy())
        return tensors

    denoiser = denoiser_of(pipe)
    noise = initial_noise([prompt.noise_seed for prompt in prompts], denoiser.config)
    result = pipe(
        **call_arguments(pipe, prompts, schedule, guidance_scale),
        latents=noise.to(pipe.device, denoiser.dtype),
        callback_on_step_end=keep,
        output_type="np",
    )
    return result.images.astype(np.float32), np.stack(latents)
