"""Metrics that need trained networks: LPIPS, FID, sFID, FID in CLIP's features and CLIP score.

Distances are to the FP pipeline's pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.context import silent
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families.network_files import check_network
from s2p_deploy.metric_networks import (
    CLIP,
    INCEPTION,
    LPIPS,
    SMALLEST,
    InceptionFeatures,
    Lpips,
    byte_planes,
    load_weights,
    lpips_distances,
)
from s2p_deploy.metrics import CPU, distance_of
from s2p_deploy.records import Skipped
from s2p_deploy.validation.measurements import Perceptual

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from s2p_deploy.context import Progress
    from s2p_deploy.metric_networks import MetricWeights
    from s2p_deploy.records import Number
    from s2p_deploy.validation.pictures import PicturePairs

_BATCH = 16
_CLASSES = ("fc.",)  # of Inception's file, behind the features


def measure_perceptual(
    pairs: PicturePairs, weights: MetricWeights, progress: Progress = silent, device: torch.device = CPU
) -> Perceptual:
    """Computes every metric whose weights are there, its network on ``device``; the others are skipped.

    Raises:
        IntegrityError: a file of weights is damaged, or of another network.
    """
    lpips, inception, clip = (weights.place(name) for name in (LPIPS, INCEPTION, CLIP))
    fid, sfid = (inception,) * 2 if isinstance(inception, Skipped) else _inception(pairs, inception, progress, device)
    fid_clip, score = (clip,) * 2 if isinstance(clip, Skipped) else _clip(pairs, clip, progress, device)
    return Perceptual(
        lpips=lpips if isinstance(lpips, Skipped) else _lpips(pairs, lpips, progress, device),
        fid=fid,
        sfid=sfid,
        fid_clip=fid_clip,
        clip_score=score,
    )


def _lpips(pairs: PicturePairs, file: Path, progress: Progress, device: torch.device) -> NDArray[np.float64] | Skipped:
    if min(pairs.reference.shape[1:3]) < SMALLEST:
        return Skipped(f"LPIPS needs pictures of {SMALLEST} pixels or more")
    network = load_weights(Lpips(), file).to(device)

    def distances(some: slice) -> tuple[NDArray[Any], ...]:
        return (lpips_distances(network, pairs.reference[some], pairs.candidate[some], device),)

    return _batched(distances, len(pairs.reference), "LPIPS", progress)[0]


def _inception(
    pairs: PicturePairs, file: Path, progress: Progress, device: torch.device
) -> tuple[Number | Skipped, Number | Skipped]:
    network = load_weights(InceptionFeatures(), file, unused=_CLASSES).to(device)

    def features(some: slice) -> tuple[NDArray[Any], ...]:
        both = (network(byte_planes(pictures[some], device)) for pictures in (pairs.reference, pairs.candidate))
        return tuple(found.cpu().numpy() for pair in both for found in pair)

    pooled, spatial, other_pooled, other_spatial = _batched(features, len(pairs.reference), "FID", progress)
    return distance_of(pooled, other_pooled), distance_of(spatial, other_spatial)


def _clip(
    pairs: PicturePairs, folder: Path, progress: Progress, device: torch.device
) -> tuple[Number | Skipped, NDArray[np.float64]]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        check_network(folder, CLIPModel)
        network = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval().to(device)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (InputError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(f"{folder} is no CLIP in transformers' format with safetensors: {reason}") from error

    def embeddings(some: slice) -> tuple[NDArray[Any], ...]:
        read = processor(text=list(pairs.texts[some]), return_tensors="pt", padding=True, truncation=True)
        words = network.get_text_features(**read.to(device)).pooler_output
        shown = (
            processor(images=list(pictures[some]), return_tensors="pt").to(device)
            for pictures in (pairs.reference, pairs.candidate)
        )
        seen = [network.get_image_features(**pictures).pooler_output for pictures in shown]
        return tuple(found.cpu().numpy() for found in (words, *seen))

    words, first, second = _batched(embeddings, len(pairs.texts), "CLIP", progress)
    scores = [100 * np.clip((_units(words) * _units(seen)).sum(1), 0, None) for seen in (first, second)]
    return distance_of(first, second), np.stack(scores)


def _batched(
    make: Callable[[slice], tuple[NDArray[Any], ...]], count: int, stage: str, progress: Progress
) -> list[NDArray[np.float64]]:
    """Calls ``make`` on all samples, a batch at a time, and joins each of its results."""

    def parts() -> Iterator[tuple[NDArray[Any], ...]]:
        for start in range(0, count, _BATCH):
            with torch.no_grad():
                yield make(slice(start, start + _BATCH))
            progress(stage, min(start + _BATCH, count), count)

    return [np.concatenate(found).astype(np.float64) for found in zip(*parts(), strict=True)]


def _units(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    units: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units
