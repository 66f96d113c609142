"""What networks see in two sets of pictures: LPIPS, FID, sFID, FID in CLIP's features, CLIP score.

Networks come from local safetensors alone. The FP pipeline's pictures are the reference of all distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.errors import IntegrityError
from s2p_deploy.progress import silent
from s2p_deploy.validation.distances import distance_of
from s2p_deploy.validation.inception import InceptionFeatures
from s2p_deploy.validation.lpips import SMALLEST, Lpips
from s2p_deploy.validation.measurements import Perceptual
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.weights import CLIP, INCEPTION, LPIPS, load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.progress import Progress
    from s2p_deploy.validation.numbers import Number
    from s2p_deploy.validation.report_pictures import Pairs
    from s2p_deploy.validation.weights import MetricWeights

_BATCH = 16
_CLASSES = ("fc.",)  # of Inception's file, behind the features


def measure_perceptual(pairs: Pairs, weights: MetricWeights, progress: Progress = silent) -> Perceptual:
    """Every metric whose weights are there; the others are skipped.

    Raises:
        IntegrityError: a file of weights is damaged, or of another network.
    """
    lpips, inception, clip = (weights.place(name) for name in (LPIPS, INCEPTION, CLIP))
    fid, sfid = (inception,) * 2 if isinstance(inception, Skipped) else _inception(pairs, inception, progress)
    fid_clip, score = (clip,) * 2 if isinstance(clip, Skipped) else _clip(pairs, clip, progress)
    return Perceptual(
        lpips=lpips if isinstance(lpips, Skipped) else _lpips(pairs, lpips, progress),
        fid=fid,
        sfid=sfid,
        fid_clip=fid_clip,
        clip_score=score,
    )


def _lpips(pairs: Pairs, file: Path, progress: Progress) -> NDArray[np.float64] | Skipped:
    if min(pairs.reference.shape[1:3]) < SMALLEST:
        return Skipped(f"LPIPS needs pictures of {SMALLEST} pixels or more")
    network = load_weights(Lpips(), file)

    def distances(some: slice) -> tuple[NDArray[Any], ...]:
        first, second = (_planes(pictures[some]) / 127.5 - 1 for pictures in (pairs.reference, pairs.candidate))
        return (network(first, second).numpy(),)

    return _batched(distances, len(pairs.reference), "LPIPS", progress)[0]


def _inception(pairs: Pairs, file: Path, progress: Progress) -> tuple[Number | Skipped, Number | Skipped]:
    network = load_weights(InceptionFeatures(), file, unused=_CLASSES)

    def features(some: slice) -> tuple[NDArray[Any], ...]:
        both = (network(_planes(pictures[some])) for pictures in (pairs.reference, pairs.candidate))
        return tuple(found.numpy() for pair in both for found in pair)

    pooled, spatial, other_pooled, other_spatial = _batched(features, len(pairs.reference), "FID", progress)
    return distance_of(pooled, other_pooled), distance_of(spatial, other_spatial)


def _clip(pairs: Pairs, folder: Path, progress: Progress) -> tuple[Number | Skipped, NDArray[np.float64]]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        network = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(f"{folder} is no CLIP in transformers' format with safetensors: {reason}") from error

    def embeddings(some: slice) -> tuple[NDArray[Any], ...]:
        read = processor(text=list(pairs.texts[some]), return_tensors="pt", padding=True, truncation=True)
        words = network.get_text_features(**read).pooler_output
        seen = [
            network.get_image_features(**processor(images=list(pictures[some]), return_tensors="pt")).pooler_output
            for pictures in (pairs.reference, pairs.candidate)
        ]
        return tuple(found.numpy() for found in (words, *seen))

    words, first, second = _batched(embeddings, len(pairs.texts), "CLIP", progress)
    scores = [100 * np.clip((_units(words) * _units(seen)).sum(1), 0, None) for seen in (first, second)]
    return distance_of(first, second), np.stack(scores)


def _batched(
    make: Callable[[slice], tuple[NDArray[Any], ...]], count: int, stage: str, progress: Progress
) -> list[NDArray[np.float64]]:
    """What ``make`` gives for all samples, a batch at a time, each part joined."""

    def parts() -> Iterator[tuple[NDArray[Any], ...]]:
        for start in range(0, count, _BATCH):
            with torch.no_grad():
                yield make(slice(start, start + _BATCH))
            progress(stage, min(start + _BATCH, count), count)

    return [np.concatenate(found).astype(np.float64) for found in zip(*parts(), strict=True)]


def _planes(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """Float32 [n, 3, H, W] in 0..255."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float()


def _units(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    units: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units
