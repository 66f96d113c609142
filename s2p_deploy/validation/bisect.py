"""Bisection: finds the layers that cost a calibrated model most fidelity, and the formats that the plan should change.

Layers of the fake-quant model are switched to floating point, a block at a time and then one by one, on stored latents:
no engine and no pictures. Errors do not pile up over calls, but they do through the network, so a layer counts with
what it does to the prediction. The price is a few dozen passes over the latents (:attr:`Bisection.passes`).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from s2p_deploy.context import silent
from s2p_deploy.metrics import sqnr_db
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records import PrecisionPlan
from s2p_deploy.validation.reference import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import LayerPlan
    from s2p_deploy.validation.reference import ValidationLatents

Part = Literal["both", "weights", "activations"]

OTHERS = "outside of blocks"
FLOAT_BITS = 16  # what stays in floating point is deployed in half precision
_MOST_OF_IT = 0.8  # of a layer's gain: then the other half of the layer stays as it is
_WORTH_IT = 0.2  # dB, or no change is suggested


@dataclass(frozen=True)
class Gain:
    """The gain of switching something to floating point, in dB of the mean SQNR to FP."""

    name: str
    gain: float


@dataclass(frozen=True)
class LayerGain:
    """A layer: its formats now, what it gains wholly in floating point, and (where looked at) by one half of it."""

    name: str
    weights: str
    activations: str
    gain: float
    weights_gain: float | None = None
    activations_gain: float | None = None


@dataclass(frozen=True)
class Change:
    """New formats of a layer; None leaves one as it is."""

    name: str
    weights: str | None
    activations: str | None


@dataclass(frozen=True)
class Bisection:
    """The result on ``latents`` latents, in ``passes`` passes over them.

    ``sqnr`` is the model's mean SQNR to FP in dB, ``expected`` the same with what ``changes`` name in floating point.
    ``groups`` are the blocks and ``layers`` the layers of those looked into, both from the largest gain on.
    """

    sqnr: float
    expected: float
    groups: tuple[Gain, ...]
    layers: tuple[LayerGain, ...]
    changes: tuple[Change, ...]
    latents: int
    passes: int


def bisect(  # noqa: PLR0913 - what is looked at, and how far, by keyword
    fake_quant: FakeQuantDenoiser,
    unquantized: IndexedDenoiser,
    latents: ValidationLatents,
    expected: NDArray[np.float32],
    *,
    groups: int = 4,
    top: int = 3,
    progress: Progress = silent,
) -> Bisection:
    """Searches the ``groups`` blocks that gain most, and suggests a change of the ``top`` layers in them.

    Args:
        fake_quant: the model.
        unquantized: the same before anything is quantized, on the same device.
        latents: what it is run on.
        expected: float32 [n, C, H, W] the FP denoiser's predictions.
        groups: how many blocks are looked into.
        top: how many layers are looked at more closely.
        progress: told after every pass.
    """
    plan = fake_quant.denoiser.plan
    members = _groups(unquantized, [layer.name for layer in plan.layers if _formats(plan, layer) != ("none", "none")])
    trial = _Trial(fake_quant, unquantized, latents, expected, progress)
    found = trial.gains("blocks", {name: dict.fromkeys(layers, "both") for name, layers in members.items()})
    looked_into = [layer for group in found[:groups] for layer in members[group.name]]
    gains = trial.gains("layers", {layer: {layer: "both"} for layer in looked_into})
    layers = [_layer_gain(plan, gain) for gain in gains]
    layers[:top] = [_halves(layer, trial) for layer in layers[:top]]
    changes = tuple(change for layer in layers[:top] if (change := suggested(layer)) is not None)
    together = {change.name: _part_of(change) for change in changes}
    best = trial.gain(together) if together else 0.0
    return Bisection(
        trial.sqnr, trial.sqnr + best, tuple(found), tuple(layers), changes, len(latents), len(trial.passes)
    )


def suggested(layer: LayerGain) -> Change | None:
    """Suggests the cheapest change that gains most of what floating point would; None where that is hardly anything.

    Weights go to INT8, and to floating point where they are INT8 already, together with the activations, which no
    engine runs in integers beside them.
    """
    if layer.gain < _WORTH_IT:
        return None
    enough = _MOST_OF_IT * layer.gain
    if layer.activations != "none" and (layer.activations_gain or 0.0) >= enough:
        return Change(layer.name, None, "none")
    low = layer.weights not in {"int8", "none"}
    if low and (layer.weights_gain or 0.0) >= enough:
        return Change(layer.name, "int8", None)
    return Change(layer.name, "int8" if low else "none", None if layer.activations == "none" else "none")


def changed_plan(plan: PrecisionPlan, changes: Iterable[Change]) -> PrecisionPlan:
    """Applies the changes to the plan, as ``calibrate --plan`` takes it, without quantizers that nothing reads."""
    by_layer = {change.name: change for change in changes}
    layers = tuple(_changed(layer, by_layer[layer.name]) if layer.name in by_layer else layer for layer in plan.layers)
    readers = {
        quantizer.name: tuple(s.name for s in layers if s.activation_quantizer == quantizer.name)
        for quantizer in plan.activation_quantizers
    }
    quantizers = tuple(
        replace(quantizer, layers=readers[quantizer.name])
        for quantizer in plan.activation_quantizers
        if readers[quantizer.name]
    )
    return PrecisionPlan(layers, quantizers)


def rules_of(changes: Iterable[Change]) -> list[dict[str, str]]:
    """Writes the changes as rules to append to a recipe's."""
    named = ({"match": c.name, "weights": c.weights, "activations": c.activations} for c in changes)
    return [{key: value for key, value in rule.items() if value is not None} for rule in named]


def plan_bits(plan: PrecisionPlan, sizes: Mapping[str, int]) -> dict[str, float]:
    """Computes average bits: ``weights`` over the weights (``sizes`` by layer), ``activations`` over the layers."""
    formats = {layer.name: _formats(plan, layer) for layer in plan.layers}
    total = sum(sizes[name] for name in formats)
    return {
        "weights": sum(_bits(weights) * sizes[name] for name, (weights, _) in formats.items()) / total,
        "activations": float(np.mean([_bits(activations) for _, activations in formats.values()])),
    }


class _Trial:
    """Passes over the latents, with layers switched."""

    def __init__(
        self,
        fake_quant: FakeQuantDenoiser,
        unquantized: IndexedDenoiser,
        latents: ValidationLatents,
        expected: NDArray[np.float32],
        progress: Progress,
    ) -> None:
        self._fake_quant, self._unquantized = fake_quant, unquantized
        self._latents, self._expected, self._progress = latents, expected, progress
        self.passes: list[float] = []
        self.sqnr = self._pass({})

    def gain(self, switched: Mapping[str, Part]) -> float:
        """Measures the gain in dB with these parts of layers in floating point."""
        return self._pass(switched) - self.sqnr

    def gains(self, stage: str, trials: Mapping[str, Mapping[str, Part]]) -> list[Gain]:
        """Measures the gains of all trials, from the largest on."""
        found = []
        for name, switched in trials.items():
            found.append(Gain(name, self.gain(switched)))
            self._progress(stage, len(found), len(trials))
        return sorted(found, key=lambda gain: -gain.gain)

    def _pass(self, switched: Mapping[str, Part]) -> float:
        with ExitStack() as hooks, torch.no_grad():
            for name, part in switched.items():
                hook = _switched(self._unquantized.network.get_submodule(name), part)
                hooks.callback(self._fake_quant.layer(name).register_forward_hook(hook).remove)
            device = self._fake_quant.device
            outputs = [to_numpy(self._fake_quant(*few.arguments(device))) for few in self._latents.parts()]
        self.passes.append(float(np.mean(sqnr_db(self._expected, np.concatenate(outputs)))))
        return self.passes[-1]


def _switched(twin: nn.Module, part: Part) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Makes a forward hook that puts a part of the layer in floating point; ``twin`` has its unquantized weights."""

    def result(module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        if part == "both":
            output: Tensor = twin(args[0])
        elif part == "weights":
            output = twin(module.get_submodule("input_quantizer")(args[0]))
        elif isinstance(module, nn.Conv2d):
            output = nn.Conv2d.forward(module, args[0])  # the weight as it is, on its grid
        else:
            assert isinstance(module, nn.Linear)  # layers are either
            output = nn.Linear.forward(module, args[0])
        return output

    return result


def _groups(denoiser: IndexedDenoiser, layers: Sequence[str]) -> dict[str, list[str]]:
    """Groups layers by the block that they are in, blocks in the network's order."""
    owner = {
        layer: block.name
        for block in denoiser.family.blocks(denoiser.network)
        for module in block.modules
        for layer in layers
        if layer == module or layer.startswith(f"{module}.")
    }
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(owner.get(layer, OTHERS), []).append(layer)
    return groups


def _layer_gain(plan: PrecisionPlan, gain: Gain) -> LayerGain:
    layer = next(layer for layer in plan.layers if layer.name == gain.name)
    return LayerGain(gain.name, *_formats(plan, layer), gain.gain)


def _halves(layer: LayerGain, trial: _Trial) -> LayerGain:
    weights = trial.gain({layer.name: "weights"}) if layer.weights != "none" else 0.0
    activations = trial.gain({layer.name: "activations"}) if layer.activations != "none" else 0.0
    return replace(layer, weights_gain=weights, activations_gain=activations)


def _part_of(change: Change) -> Part:
    if change.weights is None:
        return "activations"
    return "weights" if change.activations is None else "both"


def _changed(layer: LayerPlan, change: Change) -> LayerPlan:
    quantizer = None if change.activations == "none" else layer.activation_quantizer
    return replace(layer, weights=change.weights or layer.weights, activation_quantizer=quantizer, rule="bisection")


def _formats(plan: PrecisionPlan, layer: LayerPlan) -> tuple[str, str]:
    return layer.weights, "none" if layer.activation_quantizer is None else plan.quantizer(
        layer.activation_quantizer
    ).activations


def _bits(name: str) -> float:
    fmt: Any = format_by_name(name)
    return FLOAT_BITS if fmt is None else float(fmt.bits)
