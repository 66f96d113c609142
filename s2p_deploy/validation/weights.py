"""Local weights of the metrics that need some. Nothing is downloaded, and no file is read that was not pinned.

The folder holds safetensors files and ``SHA256SUMS``, as ``sha256sum`` writes it: a digest and a path a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records.manifest import file_digest
from s2p_deploy.records.plain_files import is_plain_name, read_plain
from s2p_deploy.records.strict import reading_tensors
from s2p_deploy.validation.numbers import Skipped

if TYPE_CHECKING:
    from torch import Tensor, nn

SUMS = "SHA256SUMS"
INCEPTION, LPIPS, CLIP = "inception-v3-fid.safetensors", "lpips-alex.safetensors", "clip"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MOST = 2**20  # bytes of the list
_COUNTER = "num_batches_tracked"  # of training; files may leave it out


@dataclass(frozen=True)
class MetricWeights:
    """A folder of weights; ``digests`` are those of the files that metrics read, which were checked."""

    folder: Path
    digests: dict[str, str]

    def place(self, name: str) -> Path | Skipped:
        """A file or folder of the folder, or that it is not there."""
        path = self.folder / name
        return path if path.exists() else Skipped(f"the folder of weights has no {name}")


def open_weights(folder: Path) -> MetricWeights:
    """Checks every file that a metric would read against the folder's ``SHA256SUMS``.

    Raises:
        InputError: there is no such folder, or no list in it. IntegrityError: the list is damaged, or a file is not in
            it or not what it says.
    """
    if not (folder / SUMS).is_file():
        raise InputError(f"--weights-dir {folder} has no {SUMS}: run sha256sum on its files (docs/validation.md)")
    pinned = _pinned(folder)
    files = [path for name in (INCEPTION, LPIPS, CLIP) for path in _files(folder / name)]
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    return MetricWeights(folder, {name: _checked(folder, name, pinned) for name in names})


def load_weights(network: nn.Module, file: Path, unused: tuple[str, ...] = ()) -> nn.Module:
    """``network`` with the tensors of a safetensors file, for inference; keys may begin with one of ``unused``.

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
