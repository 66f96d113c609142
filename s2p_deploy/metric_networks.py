"""Networks that metrics of pictures read: LPIPS and the Inception of FID, and the folder that their weights come from.

Weights come from a local folder of safetensors files with a ``SHA256SUMS`` file, as ``sha256sum`` writes it. Nothing is
downloaded, and no file is read that was not pinned there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import Skipped
from s2p_deploy.records.artifacts import file_digest
from s2p_deploy.records.files import is_plain_name, read_plain
from s2p_deploy.records.typed_json import reading_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SUMS = "SHA256SUMS"
INCEPTION, LPIPS, CLIP = "inception-v3-fid.safetensors", "lpips-alex.safetensors", "clip"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MOST = 2**20  # bytes of the list
_COUNTER = "num_batches_tracked"  # of training; files may leave it out
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10  # in a unit of length
_LAYERS = (2, 5, 8, 10, 12)  # ends of the slices of AlexNet that are compared: behind its ReLUs
_CHANNELS = (64, 192, 384, 256, 256)
SMALLEST = 31  # rows and columns of a picture, below which AlexNet has nothing left
_SIDE = 299
_SPATIAL_CHANNELS = 7  # of Mixed_6d's first branch: 7 x 17 x 17 features

_ONE, _ROW, _COLUMN = (1, 1), (1, 7), (7, 1)


@dataclass(frozen=True)
class MetricWeights:
    """A folder of weights; ``digests`` are those of the files that metrics read, which were checked."""

    folder: Path
    digests: dict[str, str]

    def place(self, name: str) -> Path | Skipped:
        """Finds a file or folder in the folder, or says that it is not there."""
        path = self.folder / name
        return path if path.exists() else Skipped(f"the folder of weights has no {name}")


def open_weights(folder: Path) -> MetricWeights:
    """Checks every file that a metric would read against the folder's ``SHA256SUMS``.

    Raises:
        InputError: there is no such folder, or no list in it. IntegrityError: the list is damaged, or a file is not in
            it or not what it says.
    """
    if not (folder / SUMS).is_file():
        raise InputError(f"--weights-dir {folder} has no {SUMS}: run sha256sum on its files (docs/validating.md)")
    pinned = _pinned(folder)
    files = [path for name in (INCEPTION, LPIPS, CLIP) for path in _files(folder / name)]
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    return MetricWeights(folder, {name: _checked(folder, name, pinned) for name in names})


def load_weights(network: nn.Module, file: Path, unused: tuple[str, ...] = ()) -> nn.Module:
    """Loads a safetensors file into ``network``, for inference; keys that begin with one of ``unused`` are left out.

    Raises:
        IntegrityError: the file is damaged, or not of this network.
    """
    from safetensors.torch import load_file

    with reading_tensors(file):
        stored = load_file(file)
    given = {name: tensor for name, tensor in stored.items() if not name.startswith(unused or ("\0",))}
    _check_keys(network.state_dict(), given, file)
    network.load_state_dict(given, strict=False)
    return network.eval().requires_grad_(requires_grad=False)


def _check_keys(expected: dict[str, Tensor], given: dict[str, Tensor], file: Path) -> None:
    wanted = {name for name in expected if not name.endswith(_COUNTER)}
    for name in sorted((wanted - set(given)) | (set(given) - set(expected))):
        raise IntegrityError(f"{file}: {name} {'is missing' if name in wanted else 'has no place in this network'}")
    for name in sorted(wanted):
        if expected[name].shape != given[name].shape:
            raise IntegrityError(f"{file}: {name} is {list(given[name].shape)}, expected {list(expected[name].shape)}")


def _pinned(folder: Path) -> dict[str, str]:
    try:
        lines = read_plain(folder, SUMS, _MOST).decode().splitlines()
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{folder / SUMS} is not UTF-8 text") from error
    pinned = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        name = match[2].removeprefix("./") if match else ""
        if match is None or not is_plain_name(name):
            raise IntegrityError(f"{folder / SUMS}:{number} is not a SHA-256 and a path in the folder")
        pinned[name] = match[1]
    return pinned


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if not file.is_dir()] if path.is_dir() else [path] * path.exists()


def _checked(folder: Path, name: str, pinned: dict[str, str]) -> str:
    if name not in pinned:
        raise IntegrityError(f"{folder / name} is not pinned: it has no line in {SUMS}")
    if file_digest(folder / name) != pinned[name]:
        raise IntegrityError(f"{folder / name} is not the file that {SUMS} names (its SHA-256 differs)")
    return pinned[name]


def byte_planes(pictures: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Converts pictures to float32 [n, 3, H, W] in 0..255."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(device).float()


class Lpips(nn.Module):
    """LPIPS (arXiv 1801.03924, version 0.1) on AlexNet: how far apart two pictures look.

    One file holds the features of AlexNet under torchvision's names (``features.0.weight``, ...) and the five learned
    weightings under those of the lpips package (``lin0.model.1.weight``, ...).
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        for place, channels in enumerate(_CHANNELS):
            model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{place}", nn.ModuleDict({"model": model}))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances float32 [n] of pictures float32 [n, 3, H, W] in [-1, 1]; H and W at least :data:`SMALLEST`."""
        shift, scale = (torch.tensor(values).reshape(1, 3, 1, 1).to(first.device) for values in (_SHIFT, _SCALE))
        both = torch.cat([first, second])
        both, distance, start = (both - shift) / scale, first.new_zeros(len(first)), 0
        for place, end in enumerate(_LAYERS):
            both = self.features[start:end](both)
            one, two = (both / (both.square().sum(1, keepdim=True).sqrt() + _EPSILON)).chunk(2)
            weighting = self.get_submodule(f"lin{place}.model")
            distance = distance + weighting((one - two).square()).mean((1, 2, 3))
            start = end
        return distance


def lpips_distances(
    network: nn.Module, reference: NDArray[np.uint8], candidate: NDArray[np.uint8], device: torch.device
) -> NDArray[np.float64]:
    """Computes LPIPS float64 [n] between pictures uint8 [n, H, W, 3] with a loaded :class:`Lpips` on ``device``."""
    both = (byte_planes(pictures, device) / 127.5 - 1 for pictures in (reference, candidate))
    with torch.no_grad():
        distances: NDArray[np.float64] = network(*both).cpu().double().numpy()
    return distances


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
    """Ends a path in two convolutions side by side: a row and a column."""
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
    """Inception v3 as FID knows it: the network of 2015, whose weights were published for TensorFlow.

    Its parameters are named as in torch-fidelity's and pytorch-fid's files. It differs from torchvision's in its
    average pools, which leave the padding out, and in its last block, which takes a maximum instead.
    """

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
        """Joins the outputs of all paths for ``x``, and ``pooled``."""
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
    """Resizes to 299 x 299 as TensorFlow 1 did: linear between pixels, with the first of both grids on each other."""
    for axis in (2, 3):
        size = x.shape[axis]
        place = torch.arange(_SIDE, dtype=torch.float32, device=x.device) * (size / _SIDE)
        low = place.long()
        part = (place - low).reshape([-1 if axis == other else 1 for other in range(4)])
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(size - 1))
        x = first + (second - first) * part
    return x
