"""Chooses the layers that get low-rank branches, and finds what each of them reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError
from s2p_deploy.export.passes.lora_branches import LoraTarget
from s2p_deploy.export.regions import module_path
from s2p_deploy.families.lora import Lora, changeable_weights, check_low_rank, component_checkpoints
from s2p_deploy.records.calibrated_model import parameter_name
from s2p_deploy.records.optional_inputs import MOST_RANK

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx_ir as ir

    from s2p_deploy.export.regions import LayerNode
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import CalibratedModel, TransformSpec

_CONVOLUTIONS = "convolutions"
_KINDS = (
    ("attention", re.compile(r"\battn\d?\.")),
    ("feed-forward", re.compile(r"\bff(?:_context)?\.")),
    ("projections", re.compile(r"(?:^|\.)(?:proj_in|proj_out|context_embedder)$")),
)
LORA_KINDS = (*(kind for kind, _ in _KINDS), _CONVOLUTIONS)
_OWN_REWRITES = {"Sub", "Div"}  # of a shift and of a smoothing


def kind_of(path: str, op: str) -> str:
    """Returns the kind of a layer that a LoRA may change; ``op`` is conv or linear."""
    for kind, pattern in _KINDS:
        if pattern.search(path):
            return kind
    return _CONVOLUTIONS if op == "conv" else "projections"


@dataclass(frozen=True)
class LoraRequest:
    """Low-rank branches that a graph is to have.

    Attributes:
        rank: of each branch: the ranks of all adapters that act in one batch fit side by side.
        kinds: which layers have one.
        paths: exactly the layers that have one, as diffusers names them, whatever their kind (None: by kind).

    Raises:
        InputError: the rank is out of range, or a kind is unknown.
    """

    rank: int
    kinds: tuple[str, ...] = ("attention",)
    paths: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise InputError(f"a LoRA rank of {self.rank} must be 1 to {MOST_RANK}")
        unknown = [kind for kind in self.kinds if kind not in LORA_KINDS]
        if unknown:
            raise InputError(f"{unknown[0]!r} are no layers for LoRAs: name {', '.join(LORA_KINDS)}")

    def wants(self, path: str, op: str) -> bool:
        """Tells whether a layer of that path and op has a branch."""
        return path in self.paths if self.paths is not None else kind_of(path, op) in self.kinds


def lora_request(
    rank: int | None, kinds: tuple[str, ...], files: Sequence[Path], base: BasePipeline | None
) -> LoraRequest:
    """Makes the request for branches at the layers that LoRA ``files`` for the pipeline ``base`` change, or by kind.

    The largest rank of the files is that of the branches where none is named.

    Raises:
        InputError: a file is no LoRA of the pipeline, or is none that a branch can compute; the rank is out of range.
    """
    if base is None:
        assert rank is not None, "without files there is a rank"
        return LoraRequest(rank, kinds)
    weights = changeable_weights(component_checkpoints(base))
    denoiser = base.denoiser_folder.name
    paths: set[str] = set()
    most = 0
    for file in files:
        layers = [layer for layer in Lora(file, weights).layers if layer.component == denoiser]
        check_low_rank(file, layers)
        paths |= {layer.path for layer in layers}
        most = max([most, *(layer.rank for layer in layers)])
    if not paths:
        raise InputError(f"LoRA {files[0]} changes the text encoders alone, which no graph holds: leave --lora-for out")
    return LoraRequest(rank or most, kinds, frozenset(paths))


def lora_targets(
    calibrated: CalibratedModel, layers: Sequence[LayerNode], request: LoraRequest
) -> tuple[LoraTarget, ...]:
    """Finds the layers that get a branch, and what they read.

    Raises:
        InputError: one was split for its quantization, is on the time path, which is precalculated, or there is none.
    """
    spec = calibrated.transforms
    norms = {reader: norm for norm, readers in spec.shifted_norms.items() for reader in readers}
    targets = []
    for layer in layers:
        path = diffusers_path(layer.plan.name, spec)
        if not request.wants(path, layer.plan.op):
            continue
        if path in spec.split:
            raise InputError(f"{path} was split for its quantization, so no LoRA can have a slot there")
        shift = partial(calibrated.tensor, parameter_name(f"{norms[path]}.shift")) if path in norms else None
        targets.append(LoraTarget(layer, path, _read_by(layer, path), shift))
    missing = sorted((request.paths or frozenset()) - {target.path for target in targets})
    if missing:
        raise InputError(
            f"a LoRA changes {missing[0]}, which is on the time path: that is precalculated, so fuse this LoRA instead"
            " (calibrate --lora, or adapt)"
        )
    if not targets:
        raise InputError(f"no layer of this denoiser is of the kinds {', '.join(request.kinds)}: name others")
    return tuple(targets)


def diffusers_path(name: str, spec: TransformSpec) -> str:
    """Returns the path of a planned layer in the network as it was before its rewrites."""
    for ending, rewritten in (
        (".layer", (*spec.smoothed, *spec.shifted)),
        (".head", spec.split),
        (".skip", spec.split),
    ):
        path = name.removesuffix(ending)
        if path != name and path in rewritten:
            return path
    return name


def _read_by(layer: LayerNode, path: str) -> ir.Value:
    """Finds what a layer reads, before a shift or a smoothing of its own; a convolution's padding stays."""
    read = layer.input
    while (producer := read.producer()) is not None:
        own = producer.op_type in _OWN_REWRITES and module_path(producer) == path
        before = producer.inputs[0]
        if not own or before is None:
            break
        read = before
    return read
