"""Mutations of ``act_scales.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
from safetensors.numpy import load_file, save_file

FILE = "act_scales.safetensors"
NONSENSE = (np.nan, np.inf, -np.inf, 0.0, -0.03, 1e-38, 1e38)


def _save(folder: Path, scales: np.ndarray, calibrated: np.ndarray, quantizers: str = "conv\nto_q") -> None:
    tensors = {"act_scales": np.ascontiguousarray(scales), "calibrated": calibrated}
    save_file(tensors, folder / FILE, metadata={"quantizers": quantizers})


def nonsense_value(folder: Path, random: Random) -> None:
    tensors = load_file(folder / FILE)
    tensors["act_scales"][random.randrange(1000), random.randrange(2)] = random.choice(NONSENSE)
    _save(folder, tensors["act_scales"], tensors["calibrated"])


def ten_times(folder: Path, random: Random) -> None:
    tensors = load_file(folder / FILE)
    _save(folder, tensors["act_scales"] * np.float32(random.choice([10, 0.1])), tensors["calibrated"])


def shape(folder: Path, random: Random) -> None:
    tensors = load_file(folder / FILE)
    scales = tensors["act_scales"]
    others = [scales[:-1], scales[:1], scales[:0], scales[:, :1], scales.T, scales.reshape(-1), scales[None]]
    _save(folder, random.choice([*others, scales[[0] * 2000]]), tensors["calibrated"])


def element_type(folder: Path, random: Random) -> None:
    tensors = load_file(folder / FILE)
    kind = random.choice([np.float64, np.float16, np.int8, np.int64, np.bool_])
    if random.random() < 0.5:
        _save(folder, tensors["act_scales"].astype(kind), tensors["calibrated"])
    else:
        _save(folder, tensors["act_scales"], tensors["calibrated"].astype(random.choice([np.float32, np.int8])))


def trained_rows(folder: Path, random: Random) -> None:
    tensors = load_file(folder / FILE)
    rows = random.choice([[-1], [1000], [2**62], [[1, 2]], 3])
    _save(folder, tensors["act_scales"], np.asarray(rows, np.int64))


def quantizer_names(folder: Path, random: Random) -> None:
    tensors = load_file(folder / FILE)
    names = random.choice(["conv", "", "to_q\nconv", "conv\nconv", "conv\nother", "a\nb\nc", "\n"])
    _save(folder, tensors["act_scales"], tensors["calibrated"], names)


def header(folder: Path, random: Random) -> None:
    """The header's length, or what it says of a tensor."""
    data = (folder / FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    if random.random() < 0.5:
        wrong = random.choice([0, 1, size - 1, size + 8, 2**31, 2**40, 2**63, 2**64 - 1])
        (folder / FILE).write_bytes(wrong.to_bytes(8, "little") + data[8:])
        return
    said = json.loads(data[8 : 8 + size])
    said["act_scales"][random.choice(["shape", "data_offsets", "dtype"])] = random.choice(
        [[0, 2**62], [-1, 8], [2**40, 2**40], [8, 0], "F8_E4M3", "BF16", "Q4", None, []]
    )
    text = random.choice([json.dumps(said), "[" * 5000, "{}", json.dumps(said)[:-1]]).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def swapped_columns(folder: Path, random: Random) -> None:
    """Every value stays in its range: still a valid table, of another model."""
    tensors = load_file(folder / FILE)
    scales = tensors["act_scales"][:, ::-1] if random.random() < 0.5 else tensors["act_scales"][::-1]
    _save(folder, scales, tensors["calibrated"])


WRONG_TABLES = (nonsense_value, nonsense_value, ten_times, shape, element_type, trained_rows, header)
OTHER_TABLES = (swapped_columns, quantizer_names)
