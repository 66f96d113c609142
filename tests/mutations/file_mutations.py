"""Mutations that know nothing of a file's format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

Mutation = Callable[[Path, Random], None]


def _file(folder: Path, random: Random) -> Path:
    sealed = {"manifest.json", "manifest.sig"}
    return random.choice(sorted(path for path in folder.iterdir() if path.name not in sealed))


def flip_bits(folder: Path, random: Random) -> None:
    path = _file(folder, random)
    data = bytearray(path.read_bytes())
    for _ in range(random.choice([1, 1, 2, 8])):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def flip_head(folder: Path, random: Random) -> None:
    """Where lengths and types stand."""
    path = _file(folder, random)
    data = bytearray(path.read_bytes())
    data[random.randrange(min(64, len(data)))] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
    path.write_bytes(data)


def cut(folder: Path, random: Random) -> None:
    path = _file(folder, random)
    os.truncate(path, random.randrange(path.stat().st_size))


def cut_out(folder: Path, random: Random) -> None:
    path = _file(folder, random)
    data = path.read_bytes()
    start = random.randrange(len(data))
    path.write_bytes(data[:start] + data[start + random.choice([1, 4, 64]) :])


def extend(folder: Path, random: Random) -> None:
    with _file(folder, random).open("ab") as opened:
        opened.write(random.randbytes(random.choice([1, 8, 1000])))


def overwrite_word(folder: Path, random: Random) -> None:
    path = _file(folder, random)
    data = bytearray(path.read_bytes())
    place = random.randrange(len(data))
    data[place : place + 8] = random.choice([0, 2**31, 2**63 - 1, 2**64 - 1]).to_bytes(8, "little")
    path.write_bytes(data)


def swap_files(folder: Path, random: Random) -> None:
    first, second = _file(folder, random), _file(folder, random)
    aside = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(aside)


def remove(folder: Path, random: Random) -> None:
    _file(folder, random).unlink()


def empty(folder: Path, random: Random) -> None:
    _file(folder, random).write_bytes(b"")


def add_file(folder: Path, random: Random) -> None:
    (folder / random.choice(["extra.bin", "denoiser.onnx.data2", "manifest.sig2", ".hidden"])).write_bytes(b"x")


def link_to_outside(folder: Path, random: Random) -> None:
    path = _file(folder, random)
    path.unlink()
    outside = [folder.parent / "canary.bin", folder.parent / "denoiser.onnx.data", Path("/dev/zero")]
    path.symlink_to(random.choice(outside))


def link_to_same(folder: Path, random: Random) -> None:
    """A link to a file with the right bytes, outside."""
    path = _file(folder, random)
    other = folder.parent / f"same-{path.name}"
    path.rename(other)
    path.symlink_to(other)


def hard_link(folder: Path, random: Random) -> None:
    path = _file(folder, random)
    os.link(path, folder.parent / f"second-name-{path.name}")


def folder_for_file(folder: Path, random: Random) -> None:
    path = _file(folder, random)
    path.unlink()
    path.mkdir()
    (path / "inner").write_bytes(b"x")


def pipe_for_file(folder: Path, random: Random) -> None:
    path = _file(folder, random)
    path.unlink()
    os.mkfifo(path)


def folder_behind_link(folder: Path, random: Random) -> None:
    """A file of the manifest that is reached through a linked folder."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    path = _file(folder, random)
    shutil.move(path, outside / path.name)
    (folder / "in").symlink_to(outside)


FILE_MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    flip_head,
    cut,
    cut_out,
    extend,
    overwrite_word,
    swap_files,
    remove,
    empty,
    add_file,
    link_to_outside,
    link_to_same,
    hard_link,
    folder_for_file,
    pipe_for_file,
    folder_behind_link,
)
