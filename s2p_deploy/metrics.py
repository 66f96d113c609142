"""Metrics of tensors and pictures, and the intervals of their averages.

Metrics give one number per sample, so that an average comes with a bootstrap interval and with the number of samples.
Pictures are float32 [n, H, W, 3] in [0, 1]. Identical inputs score a ceiling instead of infinity, which no average and
no JSON file could hold.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from s2p_deploy.records import Number, Skipped

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

SQNR_CEILING = 150.0
PSNR_CEILING = 100.0

# HaarPSI's constants and RGB to YIQ (Reisenhofer et al., arXiv 1607.06140; pictures in 0..255).
_HAAR_C, _HAAR_ALPHA, _HAAR_SCALES = 30.0, 4.2, 3
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))

CPU = torch.device("cpu")

# where a metric of pictures, of which more is better, is looked at
STATISTICS = {"median": "median", "p10": "10th percentile of", "worst": "worst"}
_QUANTILES = {"median": 0.5, "p10": 0.1, "worst": 0.0}
_DOUBT = 0.2

_RESAMPLES = 2000
_SEED = 0
_INTERVAL = (0.025, 0.975)
_DISTANCE_RESAMPLES = 200  # each one is a singular value problem
_MOST_RESAMPLED = 512  # samples or features, whichever are fewer: beyond, one problem takes a second


def picture_statistic(values: NDArray[Any], at: str) -> float:
    """Computes a statistic of :data:`STATISTICS` of a metric [n] of which more is better; turn around others."""
    return float(np.quantile(values, _QUANTILES[at]))


def certain_statistic(values: NDArray[Any], at: str, others: int) -> float:
    """Computes what a statistic of a metric will exceed on so many ``others``, four times in five, from its [n] values.

    Both are draws: the values that are known, and those to come. So a resample of a resample stands for the others.
    """
    known = picks(len(values))
    drawn = np.random.default_rng(_SEED + 1).integers(len(values), size=(len(known), others))
    coming = values[np.take_along_axis(known, drawn, axis=1)]
    return float(np.quantile(np.quantile(coming, _QUANTILES[at], axis=1), _DOUBT))


def median_of(values: NDArray[Any]) -> Number:
    """Computes the median of [n] with its interval."""
    return _with_interval(np.asarray(values, dtype=np.float64), np.median)


def mean_of(values: NDArray[Any]) -> Number:
    """Computes the mean of [n] with its interval."""
    return _with_interval(np.asarray(values, dtype=np.float64), np.mean)


def quantile_of(values: NDArray[Any], quantile: float) -> Number:
    """Computes a quantile of [n] with its interval."""
    return _with_interval(np.asarray(values, dtype=np.float64), partial(np.quantile, q=quantile))


def ratio_of(parts: NDArray[Any], wholes: NDArray[Any]) -> Number:
    """Computes the sum of parts [n] over the sum of wholes [n], with its interval over the n samples."""
    chosen = picks(len(parts))
    return resampled(float(parts.sum() / wholes.sum()), len(parts), parts[chosen].sum(1) / wholes[chosen].sum(1))


def resampled(value: float, n: int, values: NDArray[Any]) -> Number:
    """Makes a number over ``n`` samples; its interval is that of ``values``, one per resample of :func:`picks`."""
    low, high = np.quantile(values, _INTERVAL)
    return Number(value, n, float(low), float(high))


def picks(n: int, resamples: int = _RESAMPLES) -> NDArray[np.int64]:
    """Draws bootstrap resamples [resamples, n] with a fixed seed: the same values give the same interval."""
    return np.random.default_rng(_SEED).integers(n, size=(resamples, n))


def _with_interval(values: NDArray[np.float64], statistic: Callable[..., Any]) -> Number:
    return resampled(float(statistic(values)), len(values), statistic(values[picks(len(values))], axis=1))


def sqnr_db(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Computes SQNR float64 [n] in dB of every sample of [n, ...]: power of ``reference`` over the error's."""
    signal, noise = _power(reference), _power(candidate.astype(np.float64) - reference)
    return _decibel(signal, noise, SQNR_CEILING)


def pooled_sqnr_db(signal: float, noise: float) -> float:
    """Computes SQNR in dB of summed powers."""
    return float(pooled_sqnrs_db(np.asarray(signal), np.asarray(noise)))


def pooled_sqnrs_db(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes :func:`pooled_sqnr_db` of every element."""
    return _decibel(signal, noise, SQNR_CEILING)


def cosine(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Computes the cosine of every two samples of [n, ...], float64 [n]; not a number where one is all zero."""
    first, second = (values.reshape(len(values), -1).astype(np.float64) for values in (reference, candidate))
    with np.errstate(invalid="ignore"):
        angles: NDArray[np.float64] = (first * second).sum(1) / np.sqrt(
            np.square(first).sum(1) * np.square(second).sum(1)
        )
    return angles


def relative_error(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Computes the RMS of the error over that of the reference, float64 [n], for samples [n, ...]."""
    errors: NDArray[np.float64] = np.sqrt(_power(candidate.astype(np.float64) - reference) / _power(reference))
    return errors


def to_bytes(pictures: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Converts pictures to uint8 [n, H, W, 3], rounded as diffusers does."""
    rounded: NDArray[np.uint8] = (pictures * 255).round().clip(0, 255).astype(np.uint8)
    return rounded


def psnr_db(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float64]:
    """Computes the peak signal to noise ratio float64 [n] in dB."""
    noise = _power(candidate.astype(np.float64) - reference)
    return _decibel(np.ones_like(noise), noise, PSNR_CEILING)


def ssim(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], device: torch.device = CPU
) -> NDArray[np.float64]:
    """Computes structural similarity float64 [n] (torchmetrics: Gaussian window, sigma 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    scores = structural_similarity_index_measure(
        _planes(candidate, device), _planes(reference, device), data_range=1.0, reduction="none"
    )
    assert isinstance(scores, torch.Tensor)  # a tuple comes only on request
    return scores.cpu().double().numpy()


def haarpsi(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], device: torch.device = CPU
) -> NDArray[np.float64]:
    """Computes Haar wavelet perceptual similarity float64 [n], 1 for equal pictures (arXiv 1607.06140, in colour)."""
    first, second = (_halved_yiq(_planes(pictures, device)) for pictures in (reference, candidate))
    sides = [_side_of(first[:, :1], second[:, :1], turned) for turned in (False, True)]
    chroma = _similarity(_averaged(first[:, 1:]).abs(), _averaged(second[:, 1:]).abs()).mean(1, keepdim=True)
    local = torch.cat([sides[0][0], sides[1][0], chroma], 1)
    weight = torch.cat([sides[0][1], sides[1][1], (sides[0][1] + sides[1][1]) / 2], 1)
    total = weight.sum((1, 2, 3))
    mean = (torch.sigmoid(_HAAR_ALPHA * local) * weight).sum((1, 2, 3)) / total.clamp_min(1e-12)
    score = (torch.logit(mean) / _HAAR_ALPHA) ** 2
    return torch.where(total == 0, torch.ones_like(score), score).cpu().numpy()


def shifted(pictures: NDArray[np.float32], down: int, right: int) -> NDArray[np.float32]:
    """Pictures moved by whole pixels; what comes in at an edge repeats it."""
    height, width = pictures.shape[1:3]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pictures[:, rows][:, :, columns]


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Computes the Frechet distance of two feature sets [n, d] as Gaussians.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
    """
    gap = first.mean(0) - second.mean(0)
    one, two = (_spread_of(features) for features in (first, second))
    cross = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    return max(0.0, float(gap @ gap + np.square(one).sum() + np.square(two).sum() - 2 * cross))


def distance_of(first: NDArray[np.float64], second: NDArray[np.float64]) -> Number | Skipped:
    """Computes the Frechet distance of features [n, d] of the same n samples, with its interval.

    A resample takes the same samples of both.

    Samples that a resample repeats widen the distance, of all resamples alike: their spread is the interval, not where
    they lie. There is no interval where it would take long.
    """
    count = len(first)
    if count < 2:
        return Skipped("a distance of distributions needs at least two pictures")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return Number(float("nan"), count)
    value = frechet_distance(first, second)
    if min(first.shape) > _MOST_RESAMPLED:
        return Number(value, count)
    again = resampled_distances(first, second)
    return resampled(value, count, np.maximum(again - again.mean() + value, 0))


def resampled_distances(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes the Frechet distance float64 [resamples] of the same resamples of two feature sets [n, d].

    Those of as many samples are of the same samples: differences of two candidates' distances are paired.
    """
    chosen = (some for some in picks(len(first), _DISTANCE_RESAMPLES) if len(set(some.tolist())) > 1)
    return np.array([frechet_distance(first[some], second[some]) for some in chosen])


def _spread_of(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes a root X of the covariance, S = X' X, of at most as many rows as features or samples.

    With S1 = X' X and S2 = Y' Y, the singular values of X Y' are the roots of the eigenvalues of S1 S2: no complex
    numbers, and no d x d problem where there are few samples.
    """
    root: NDArray[np.float64] = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    if len(root) <= root.shape[1]:
        return root
    reduced: NDArray[np.float64] = np.asarray(np.linalg.qr(root, mode="r"))
    return reduced


def _power(values: NDArray[Any]) -> NDArray[np.float64]:
    flat = values.reshape(len(values), -1).astype(np.float64)
    power: NDArray[np.float64] = np.square(flat).mean(1)
    return power


def _decibel(signal: NDArray[np.float64], noise: NDArray[np.float64], ceiling: float) -> NDArray[np.float64]:
    """Converts a ratio to dB; not-a-number stays, because a gate must see it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * (np.log10(signal) - np.log10(noise))
    return np.where(noise == 0, ceiling, np.minimum(ratio, ceiling))


def _planes(pictures: NDArray[np.float32], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(device)


def _halved_yiq(planes: Tensor) -> Tensor:
    """Computes YIQ planes float64 [n, 3, H/2, W/2] of 0..255."""
    weights = torch.tensor(_YIQ, dtype=torch.float64).to(planes.device)
    return _averaged(torch.einsum("dc,nchw->ndhw", weights, planes.double() * 255))[:, :, ::2, ::2]


def _averaged(planes: Tensor) -> Tensor:
    return F.avg_pool2d(_padded(planes, 2), 2, 1)


def _padded(planes: Tensor, size: int) -> Tensor:
    """Zeros around, so that a window of ``size`` keeps the planes' size as a 'same' convolution does."""
    before, after = (size - 1) // 2, size // 2
    return F.pad(planes, (before, after, before, after))


def _side_of(reference: Tensor, candidate: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """Computes local similarity (finer scales' mean) and weight (coarsest scale) of one orientation, [n, 1, H, W]."""
    pairs = [(_haar(reference, scale, turned), _haar(candidate, scale, turned)) for scale in range(1, _HAAR_SCALES + 1)]
    similarity = torch.stack([_similarity(a, b) for a, b in pairs[:-1]]).mean(0)
    return similarity, torch.maximum(*pairs[-1])


def _haar(plane: Tensor, scale: int, turned: bool) -> Tensor:
    """Computes the magnitude of the Haar coefficients of one scale and orientation."""
    size = 2**scale
    kernel = torch.full((size, size), 2.0**-scale, dtype=plane.dtype, device=plane.device)
    kernel[: size // 2] *= -1
    kernel = kernel.T if turned else kernel
    return F.conv2d(_padded(plane, size), kernel[None, None]).abs()


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    return (2 * a * b + _HAAR_C) / (a * a + b * b + _HAAR_C)
