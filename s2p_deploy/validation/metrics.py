"""How far two tensors or two sets of pictures are apart. One number per sample, so that intervals can be computed.

Pictures are float32 [n, H, W, 3] in [0, 1]. Identical inputs score the ceiling instead of infinity, which no average
and no JSON file could hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SQNR_CEILING = 150.0
PSNR_CEILING = 100.0

# HaarPSI's constants and RGB to YIQ (Reisenhofer et al., arXiv 1607.06140; pictures in 0..255).
_HAAR_C, _HAAR_ALPHA, _HAAR_SCALES = 30.0, 4.2, 3
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def sqnr_db(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Signal to noise ratio float64 [n] in dB of every sample of [n, ...]: power of ``reference`` over the error's."""
    signal, noise = _power(reference), _power(candidate.astype(np.float64) - reference)
    return _decibel(signal, noise, SQNR_CEILING)


def pooled_sqnr_db(signal: float, noise: float) -> float:
    """Signal to noise ratio in dB of summed powers."""
    return float(pooled_sqnrs_db(np.asarray(signal), np.asarray(noise)))


def pooled_sqnrs_db(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """As :func:`pooled_sqnr_db` of every element."""
    return _decibel(signal, noise, SQNR_CEILING)


def cosine(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of the angle between every two samples of [n, ...], float64 [n]; not a number where one is all zero."""
    first, second = (values.reshape(len(values), -1).astype(np.float64) for values in (reference, candidate))
    with np.errstate(invalid="ignore"):
        angles: NDArray[np.float64] = (first * second).sum(1) / np.sqrt(
            np.square(first).sum(1) * np.square(second).sum(1)
        )
    return angles


def relative_error(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Root mean square of the error over that of the reference, float64 [n], for samples [n, ...]."""
    errors: NDArray[np.float64] = np.sqrt(_power(candidate.astype(np.float64) - reference) / _power(reference))
    return errors


def psnr_db(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float64]:
    """Peak signal to noise ratio float64 [n] in dB."""
    noise = _power(candidate.astype(np.float64) - reference)
    return _decibel(np.ones_like(noise), noise, PSNR_CEILING)


def ssim(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float64]:
    """Structural similarity float64 [n] (torchmetrics: Gaussian window, sigma 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    scores = structural_similarity_index_measure(
        _planes(candidate), _planes(reference), data_range=1.0, reduction="none"
    )
    assert isinstance(scores, torch.Tensor)  # a tuple comes only on request
    return scores.double().numpy()


def haarpsi(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float64]:
    """Haar wavelet perceptual similarity float64 [n], 1 for equal pictures (arXiv 1607.06140, its colour form)."""
    first, second = (_halved_yiq(pictures) for pictures in (reference, candidate))
    sides = [_side_of(first[:, :1], second[:, :1], turned) for turned in (False, True)]
    chroma = _similarity(_averaged(first[:, 1:]).abs(), _averaged(second[:, 1:]).abs()).mean(1, keepdim=True)
    local = torch.cat([sides[0][0], sides[1][0], chroma], 1)
    weight = torch.cat([sides[0][1], sides[1][1], (sides[0][1] + sides[1][1]) / 2], 1)
    total = weight.sum((1, 2, 3))
    mean = (torch.sigmoid(_HAAR_ALPHA * local) * weight).sum((1, 2, 3)) / total.clamp_min(1e-12)
    score = (torch.logit(mean) / _HAAR_ALPHA) ** 2
    return torch.where(total == 0, torch.ones_like(score), score).numpy()


def shifted(pictures: NDArray[np.float32], down: int, right: int) -> NDArray[np.float32]:
    """Pictures moved by whole pixels; what comes in at an edge repeats it."""
    height, width = pictures.shape[1:3]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pictures[:, rows][:, :, columns]


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Frechet distance of two feature sets [n, d] taken as Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))."""
    gap = first.mean(0) - second.mean(0)
    one, two = (_spread_of(features) for features in (first, second))
    cross = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    return max(0.0, float(gap @ gap + np.square(one).sum() + np.square(two).sum() - 2 * cross))


def _spread_of(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """A root X of the covariance, S = X' X, of at most as many rows as features or samples.

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
    """Not-a-number stays: a gate must see it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * (np.log10(signal) - np.log10(noise))
    return np.where(noise == 0, ceiling, np.minimum(ratio, ceiling))


def _planes(pictures: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def _halved_yiq(pictures: NDArray[np.float32]) -> Tensor:
    """YIQ planes float64 [n, 3, H/2, W/2] of 0..255."""
    planes = torch.einsum("dc,nchw->ndhw", torch.tensor(_YIQ, dtype=torch.float64), _planes(pictures).double() * 255)
    return _averaged(planes)[:, :, ::2, ::2]


def _averaged(planes: Tensor) -> Tensor:
    return F.avg_pool2d(_padded(planes, 2), 2, 1)


def _padded(planes: Tensor, size: int) -> Tensor:
    """Zeros around, so that a window of ``size`` keeps the planes' size as a 'same' convolution does."""
    before, after = (size - 1) // 2, size // 2
    return F.pad(planes, (before, after, before, after))


def _side_of(reference: Tensor, candidate: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """Local similarity (mean of the two finer scales) and weight (coarsest scale) of one orientation, [n, 1, H, W]."""
    pairs = [(_haar(reference, scale, turned), _haar(candidate, scale, turned)) for scale in range(1, _HAAR_SCALES + 1)]
    similarity = torch.stack([_similarity(a, b) for a, b in pairs[:-1]]).mean(0)
    return similarity, torch.maximum(*pairs[-1])


def _haar(plane: Tensor, scale: int, turned: bool) -> Tensor:
    """Magnitude of the Haar coefficients of one scale and orientation."""
    size = 2**scale
    kernel = torch.full((size, size), 2.0**-scale, dtype=plane.dtype)
    kernel[: size // 2] *= -1
    kernel = kernel.T if turned else kernel
    return F.conv2d(_padded(plane, size), kernel[None, None]).abs()


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    return (2 * a * b + _HAAR_C) / (a * a + b * b + _HAAR_C)
