"""Inception v3 as FID knows it: the network of 2015, whose weights were published for TensorFlow.

Its parameters are named as in torch-fidelity's and pytorch-fid's files. It differs from torchvision's in its average
pools, which leave the padding out, and in its last block, which takes a maximum instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 299
_SPATIAL_CHANNELS = 7  # of Mixed_6d's first branch: 7 x 17 x 17 features

_ONE, _ROW, _COLUMN = (1, 1), (1, 7), (7, 1)


@dataclass(frozen=True)
class _Step:
    name: str
    channels: int
    kernel: tuple[int, int]


_Fork = tuple[_Step, ...]  # steps side by side: one, but where a path ends in two


def _single(name: str, channels: int, kernel: tuple[int, int] = _ONE) -> tuple[_Fork, ...]:
    return ((_Step(name, channels, kernel),),)


def _path(name: str, *steps: tuple[int, tuple[int, int]]) -> tuple[_Fork, ...]:
    """Steps one after the other, numbered from 1."""
    return tuple((_Step(f"{name}_{number}", *step),) for number, step in enumerate(steps, 1))


def _forked(path: tuple[_Fork, ...], name: str, channels: int) -> tuple[_Fork, ...]:
    """The path with a row and a column side by side at its end."""
    number = len(path) + 1
    return (*path, (_Step(f"{name}_{number}a", channels, (1, 3)), _Step(f"{name}_{number}b", channels, (3, 1))))


def _sevens(channels: int) -> tuple[tuple[_Fork, ...], ...]:
    c = channels
    return (
        _single("branch1x1", 192),
        _path("branch7x7", (c, _ONE), (c, _ROW), (192, _COLUMN)),
        _path("branch7x7dbl", (c, _ONE), (c, _COLUMN), (c, _ROW), (c, _COLUMN), (192, _ROW)),
    )


_DOUBLE = _path("branch3x3dbl", (64, _ONE), (96, (3, 3)), (96, (3, 3)))
_FIVES = (_single("branch1x1", 64), _path("branch5x5", (48, _ONE), (64, (5, 5))), _DOUBLE)
_TO_17 = (_single("branch3x3", 384, (3, 3)), _DOUBLE)
_TO_8 = (
    _path("branch3x3", (192, _ONE), (320, (3, 3))),
    _path("branch7x7x3", (192, _ONE), (192, _ROW), (192, _COLUMN), (192, (3, 3))),
)
_FORKS = (
    _single("branch1x1", 320),
    _forked(_path("branch3x3", (384, _ONE)), "branch3x3", 384),
    _forked(_path("branch3x3dbl", (448, _ONE), (384, (3, 3))), "branch3x3dbl", 384),
)


class InceptionFeatures(nn.Module):
    """Pictures in, features out: those of the last pool for FID, and spatial ones for sFID."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = _Conv(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = _Conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _Conv(80, 192, (3, 3))
        self.Mixed_5b = _Block(192, _FIVES, pool=32)
        self.Mixed_5c = _Block(256, _FIVES, pool=64)
        self.Mixed_5d = _Block(288, _FIVES, pool=64)
        self.Mixed_6a = _Reduction(288, _TO_17)
        self.Mixed_6b = _Block(768, _sevens(128), pool=192)
        self.Mixed_6c = _Block(768, _sevens(160), pool=192)
        self.Mixed_6d = _Block(768, _sevens(160), pool=192)
        self.Mixed_6e = _Block(768, _sevens(192), pool=192)
        self.Mixed_7a = _Reduction(768, _TO_8)
        self.Mixed_7b = _Block(1280, _FORKS, pool=192)
        self.Mixed_7c = _Block(2048, _FORKS, pool=192, maximum=True)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features float32 [n, 2048] and [n, 2023] of pictures uint8 [n, 3, H, W]."""
        x = (_resized(pictures.float()) - 128) / 128
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :_SPATIAL_CHANNELS].flatten(1)  # of branch1x1, which comes first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean((2, 3)), spatial


class _Conv(nn.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(
        self, given: int, out: int, kernel: tuple[int, int], *, stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Paths(nn.Module):
    """Paths side by side. A step keeps the size; the last of every path of a reduction about halves it."""

    def __init__(self, given: int, paths: tuple[tuple[_Fork, ...], ...], *, halves: bool = False) -> None:
        super().__init__()
        self.paths = paths
        for path in paths:
            channels = given
            for fork in path:
                last = halves and fork is path[-1]
                for step in fork:
                    padding = (0, 0) if last else (step.kernel[0] // 2, step.kernel[1] // 2)
                    conv = _Conv(channels, step.channels, step.kernel, stride=2 if last else 1, padding=padding)
                    self.add_module(step.name, conv)
                channels = fork[0].channels

    def joined(self, x: Tensor, pooled: Tensor) -> Tensor:
        """What every path makes of ``x``, and ``pooled`` behind."""
        return torch.cat([*(self._followed(path, x) for path in self.paths), pooled], 1)

    def _followed(self, path: tuple[_Fork, ...], x: Tensor) -> Tensor:
        for fork in path:
            x = torch.cat([self.get_submodule(step.name)(x) for step in fork], 1)
        return x


class _Block(_Paths):
    """Paths and a pool of ``pool`` channels, all of one size."""

    def __init__(self, given: int, paths: tuple[tuple[_Fork, ...], ...], *, pool: int, maximum: bool = False) -> None:
        super().__init__(given, paths)
        self.maximum = maximum
        self.branch_pool = _Conv(given, pool, _ONE)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.joined(x, self.branch_pool(pooled))


class _Reduction(_Paths):
    """Paths and a pool of half the size."""

    def __init__(self, given: int, paths: tuple[tuple[_Fork, ...], ...]) -> None:
        super().__init__(given, paths, halves=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, F.max_pool2d(x, 3, 2))


def _resized(x: Tensor) -> Tensor:
    """To 299 x 299 as TensorFlow 1 did: linear between pixels, with the first of both grids on each other."""
    for axis in (2, 3):
        size = x.shape[axis]
        place = torch.arange(_SIDE, dtype=torch.float32) * (size / _SIDE)
        low = place.long()
        part = (place - low).reshape([-1 if axis == other else 1 for other in range(4)])
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(size - 1))
        x = first + (second - first) * part
    return x
