"""Pipelines with LoRAs fused into their weights: written once, one tensor in memory at a time, opened like any other.

Whatever reads weights later (walks, references, export, engines' text encoders, servers) then reads them with the LoRAs
in, and none of it has to know. It costs the disk of the components that a LoRA touches; all else is linked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.context import silent
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families.checkpoint import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, Checkpoint
from s2p_deploy.families.lora import (
    WEIGHT,
    GivenLora,
    Lora,
    LoraLayer,
    changeable_weights,
    component_checkpoints,
    fused_weight,
)
from s2p_deploy.families.network_files import check_network, component_classes, read_json
from s2p_deploy.families.pipelines import BasePipeline, resolve_base
from s2p_deploy.families.streamed_tensors import write_tensor_file
from s2p_deploy.records import file_digest
from s2p_deploy.records.files import check_room, claimed, link_or_copy, write_text, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from s2p_deploy.context import Progress

RECORD = Path("lora") / "fused.json"  # one folder down, as the files are that a pipeline's digest is of
_SUFFIX = ".safetensors"
_TOP_SUFFIXES = {".json", ".md", ".txt"}  # index and sampling of a pipeline, its card and license
_SUFFIXES = {".json", ".model", ".safetensors", ".txt"}
_Changes = list[tuple[Lora, LoraLayer, float]]


def fuse_loras(
    base: BasePipeline, given: Sequence[GivenLora], parent: Path, progress: Progress = silent
) -> BasePipeline:
    """Writes ``base`` with LoRAs in its weights to a folder ``pipeline-<digest>`` in ``parent``, once.

    The digest is of the pipeline and the LoRAs, so the same ones find what was written before. LoRAs are added in their
    order in float32; the sum is rounded once, to the type that the pipeline keeps the weight in.

    Raises:
        InputError: a LoRA cannot be read, is of another model, is given twice, or makes a weight too large for its
            type; the pipeline's files are not whole; the disk has no room.
        IntegrityError: what was written before was changed.
    """
    checkpoints = component_checkpoints(base)
    weights = changeable_weights(checkpoints)
    loras = [Lora(each.file, weights) for each in given]
    record: dict[str, Any] = {"pipeline": base.base.digest, "loras": _described(loras, given)}
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    folder = parent / f"pipeline-{key[:16]}"
    record["loras"] = fused_loras(base) + record["loras"]
    changes: dict[str, dict[str, _Changes]] = {}
    for lora, each in zip(loras, given, strict=True):
        for layer in lora.layers:
            changes.setdefault(layer.component, {}).setdefault(layer.path + WEIGHT, []).append(
                (lora, layer, each.weight)
            )
    with claimed(folder):
        if not folder.exists():
            classes = component_classes(base.folder)
            for name in changes:
                check_network(base.folder / name, classes[name])
            _write(folder, base, record, {name: (checkpoints[name], changes[name]) for name in changes}, progress)
        _check_written(folder)
    return resolve_base(str(folder))


def fused_loras(base: BasePipeline) -> list[dict[str, Any]]:
    """Lists the LoRAs in a pipeline's weights: file's name, SHA-256, weight; empty for a pipeline as it was trained."""
    file = base.folder / RECORD
    return list(read_json(file).get("loras", [])) if file.is_file() else []


def _described(loras: Sequence[Lora], given: Sequence[GivenLora]) -> list[dict[str, Any]]:
    """Describes LoRAs for the record. Raises InputError where one is given twice."""
    digests = [lora.digests() for lora in loras]
    whole = [each["sha256"] for each in digests]
    for number, digest in enumerate(whole):
        if digest in whole[:number]:
            raise InputError(f"LoRA {given[number].file} is given twice: give it once, with the sum of the weights")
    return [
        {"file": each.file.name, "sha256": own["sha256"], "weight": each.weight} | own
        for own, each in zip(digests, given, strict=True)
    ]


def _write(
    folder: Path,
    base: BasePipeline,
    record: dict[str, Any],
    touched: Mapping[str, tuple[Checkpoint, Mapping[str, _Changes]]],
    progress: Progress,
) -> None:
    size = sum(checkpoint.form(name).bytes for checkpoint, _ in touched.values() for name in _floating(checkpoint))
    check_room(folder, size, "make room, or choose another --out")
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(temporary):
            _link_others(base.folder, temporary, touched)
        total, done = sum(len(changes) for _, changes in touched.values()), 0

        def count() -> None:
            nonlocal done
            done += 1
            progress("fuse LoRAs", done, total)

        files = {}
        for name, (checkpoint, changes) in touched.items():
            stem = DIFFUSERS_WEIGHTS if name == base.denoiser_folder.name else TRANSFORMERS_WEIGHTS
            file = temporary / name / (stem + _SUFFIX)
            forms = {tensor: checkpoint.form(tensor) for tensor in _floating(checkpoint)}
            reader = _FusedTensors(checkpoint, changes, count)
            write_tensor_file(file, forms, reader.read, {"format": "pt"})
            files[file.relative_to(temporary).as_posix()] = file_digest(file, sync=True)
        (temporary / RECORD).parent.mkdir()
        write_text(temporary / RECORD, json.dumps(record | {"files": files}, indent=1) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _FusedTensors:
    """The tensors of one component with the LoRAs in, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, changes: Mapping[str, _Changes], count: Callable[[], None]) -> None:
        self._checkpoint, self._changes, self._count = checkpoint, changes, count

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Reads a tensor in the checkpoint's dtype. Raises InputError where a fused number is not finite in it."""
        weight = self._checkpoint.read(name)
        if name not in self._changes:
            return weight
        fused = fused_weight(weight, ((lora.read(layer), strength) for lora, layer, strength in self._changes[name]))
        rounded = fused.to(weight.dtype)
        if not rounded.isfinite().all():
            named = ", ".join(f"{lora.file}:{strength:g}" for lora, _, strength in self._changes[name])
            kind = str(weight.dtype).removeprefix("torch.")
            raise InputError(f"{name} is beyond {kind} with {named}: give a smaller weight, or another LoRA")
        self._count()
        return rounded


def _floating(checkpoint: Checkpoint) -> list[str]:
    """Names the tensors that a network takes: old text encoders' files hold the numbers of positions too."""
    return [name for name, stored in checkpoint.tensors.items() if stored.is_floating]


def _link_others(source: Path, target: Path, touched: Mapping[str, object]) -> None:
    """Gives a pipeline's files a second name, but for the weights of touched components."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _TOP_SUFFIXES:
            link_or_copy(path.resolve(), target / path.name)
        if not path.is_dir() or path.name == RECORD.parent.name:
            continue
        (target / path.name).mkdir()
        for file in sorted(path.iterdir()):
            of_weights = _SUFFIX in file.suffixes  # an index of shards too
            if file.is_file() and file.suffix in _SUFFIXES and not (of_weights and path.name in touched):
                link_or_copy(file.resolve(), target / path.name / file.name)


def _check_written(folder: Path) -> None:
    """Raises IntegrityError where the fused weights are not what was written."""
    for name, digest in read_json(folder / RECORD)["files"].items():
        file = folder / name
        if not file.is_file() or file_digest(file) != digest:
            raise IntegrityError(f"{file} was changed since LoRAs were fused into it: delete {folder}")
