"""Locating a bad layer: which sites cost a calibrated model most fidelity, and what the plan should give them.

Sites of the fake-quant model are switched to floating point, a block at a time and then one by one, on stored latents:
no engine and no pictures. Errors do not pile up over calls, but they do through the network, so a site counts with what
it does to the prediction. The price is a few dozen passes over the latents (:attr:`Bisection.passes`).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from s2p_deploy.numerics import format_by_name
from s2p_deploy.progress import silent
from s2p_deploy.records import PrecisionPlan
from s2p_deploy.validation.metrics import sqnr_db

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import SitePlan
    from s2p_deploy.validation.latents import ValidationLatents

Part = Literal["both", "weights", "activations"]

OTHERS = "outside of blocks"
FLOAT_BITS = 16  # what stays in floating point is deployed in half precision
_MOST_OF_IT = 0.8  # of a site's gain: then the other half of the site stays as it is
_WORTH_IT = 0.2  # dB, or no change is suggested


@dataclass(frozen=True)
class Gain:
    """What switching something to floating point gains, in dB of the mean SQNR to FP."""

    name: str
    gain: float


@dataclass(frozen=True)
class SiteGain:
    """A site: its formats now, what it gains wholly in floating point, and (where looked at) by one half of it."""

    site: str
    weights: str
    activations: str
    gain: float
    weights_gain: float | None = None
    activations_gain: float | None = None


@dataclass(frozen=True)
class Change:
    """New formats of a site; None leaves one as it is."""

    site: str
    weights: str | None
    activations: str | None


@dataclass(frozen=True)
class Bisection:
    """What was found on ``latents`` latents, in ``passes`` passes over them.

    ``sqnr`` is the model's mean SQNR to FP in dB, ``expected`` the same with what ``changes`` name in floating point.
    ``groups`` are the blocks and ``sites`` the sites of those looked into, both from the largest gain on.
    """

    sqnr: float
    expected: float
    groups: tuple[Gain, ...]
    sites: tuple[SiteGain, ...]
    changes: tuple[Change, ...]
    latents: int
    passes: int


def bisect(  # noqa: PLR0913 - what is looked at, and how far, by keyword
    fake_quant: FakeQuantDenoiser,
    unquantized: HotDenoiser,
    latents: ValidationLatents,
    expected: NDArray[np.float32],
    *,
    groups: int = 4,
    top: int = 3,
    progress: Progress = silent,
) -> Bisection:
    """Looks into the ``groups`` blocks that gain most, and suggests a change of the ``top`` sites in them.

    Args:
        fake_quant: the model.
        unquantized: the same before anything is quantized.
        latents: what it is run on.
        expected: float32 [n, C, H, W] the FP denoiser's predictions.
        groups: how many blocks are looked into.
        top: how many sites are looked at more closely.
        progress: told after every pass.
    """
    plan = fake_quant.denoiser.plan
    members = _groups(unquantized, [site.site for site in plan.sites if _formats(plan, site) != ("none", "none")])
    trial = _Trial(fake_quant, unquantized, latents, expected, progress)
    found = trial.gains("blocks", {name: dict.fromkeys(sites, "both") for name, sites in members.items()})
    looked_into = [site for group in found[:groups] for site in members[group.name]]
    gains = trial.gains("sites", {site: {site: "both"} for site in looked_into})
    sites = [_site_gain(plan, gain) for gain in gains]
    sites[:top] = [_halves(site, trial) for site in sites[:top]]
    changes = tuple(change for site in sites[:top] if (change := suggested(site)) is not None)
    together = {change.site: _part_of(change) for change in changes}
    best = trial.gain(together) if together else 0.0
    return Bisection(
        trial.sqnr, trial.sqnr + best, tuple(found), tuple(sites), changes, len(latents), len(trial.passes)
    )


def suggested(site: SiteGain) -> Change | None:
    """The cheapest change that gains most of what floating point would; None where that is hardly anything.

    Weights go to INT8, and to floating point where they are INT8 already, together with the activations, which no
    engine runs in integers beside them.
    """
    if site.gain < _WORTH_IT:
        return None
    enough = _MOST_OF_IT * site.gain
    if site.activations != "none" and (site.activations_gain or 0.0) >= enough:
        return Change(site.site, None, "none")
    low = site.weights not in {"int8", "none"}
    if low and (site.weights_gain or 0.0) >= enough:
        return Change(site.site, "int8", None)
    return Change(site.site, "int8" if low else "none", None if site.activations == "none" else "none")


def changed_plan(plan: PrecisionPlan, changes: Iterable[Change]) -> PrecisionPlan:
    """The plan with the changes, as ``calibrate --plan`` takes it; act points that nobody reads any more go."""
    by_site = {change.site: change for change in changes}
    sites = tuple(_changed(site, by_site[site.site]) if site.site in by_site else site for site in plan.sites)
    readers = {point.name: tuple(s.site for s in sites if s.act_point == point.name) for point in plan.act_points}
    points = tuple(replace(point, sites=readers[point.name]) for point in plan.act_points if readers[point.name])
    return PrecisionPlan(sites, points)


def rules_of(changes: Iterable[Change]) -> list[dict[str, str]]:
    """The changes as rules to append to a recipe's."""
    named = ({"match": c.site, "weights": c.weights, "activations": c.activations} for c in changes)
    return [{key: value for key, value in rule.items() if value is not None} for rule in named]


def plan_bits(plan: PrecisionPlan, sizes: Mapping[str, int]) -> dict[str, float]:
    """Average bits: ``weights`` over the weights, whose number by site is ``sizes``, ``activations`` over the sites."""
    formats = {site.site: _formats(plan, site) for site in plan.sites}
    total = sum(sizes[name] for name in formats)
    return {
        "weights": sum(_bits(weights) * sizes[name] for name, (weights, _) in formats.items()) / total,
        "activations": float(np.mean([_bits(activations) for _, activations in formats.values()])),
    }


class _Trial:
    """Passes over the latents, with sites switched."""

    def __init__(
        self,
        fake_quant: FakeQuantDenoiser,
        unquantized: HotDenoiser,
        latents: ValidationLatents,
        expected: NDArray[np.float32],
        progress: Progress,
    ) -> None:
        self._fake_quant, self._unquantized = fake_quant, unquantized
        self._latents, self._expected, self._progress = latents, expected, progress
        self.passes: list[float] = []
        self.sqnr = self._pass({})

    def gain(self, switched: Mapping[str, Part]) -> float:
        """In dB, with these parts of sites in floating point."""
        return self._pass(switched) - self.sqnr

    def gains(self, stage: str, trials: Mapping[str, Mapping[str, Part]]) -> list[Gain]:
        """Of all trials, from the largest on."""
        found = []
        for name, switched in trials.items():
            found.append(Gain(name, self.gain(switched)))
            self._progress(stage, len(found), len(trials))
        return sorted(found, key=lambda gain: -gain.gain)

    def _pass(self, switched: Mapping[str, Part]) -> float:
        with ExitStack() as hooks, torch.no_grad():
            for name, part in switched.items():
                hook = _switched(self._unquantized.network.get_submodule(name), part)
                hooks.callback(self._fake_quant.site(name).register_forward_hook(hook).remove)
            outputs = [
                self._fake_quant(*(torch.from_numpy(value) for value in few.inputs().values())).numpy()
                for few in self._latents.parts()
            ]
        self.passes.append(float(np.mean(sqnr_db(self._expected, np.concatenate(outputs)))))
        return self.passes[-1]


def _switched(twin: nn.Module, part: Part) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook: the site's result with a part of it in floating point; ``twin`` has the weights that it had."""

    def result(module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        if part == "both":
            output: Tensor = twin(args[0])
        elif part == "weights":
            output = twin(module.get_submodule("input_quantizer")(args[0]))
        elif isinstance(module, nn.Conv2d):
            output = nn.Conv2d.forward(module, args[0])  # the weight as it is, on its grid
        else:
            assert isinstance(module, nn.Linear)  # sites are either
            output = nn.Linear.forward(module, args[0])
        return output

    return result


def _groups(hot: HotDenoiser, sites: Sequence[str]) -> dict[str, list[str]]:
    """Sites by the block that they are in, blocks in the network's order."""
    owner = {
        site: block.name
        for block in hot.kind.blocks(hot.network)
        for module in block.modules
        for site in sites
        if site == module or site.startswith(f"{module}.")
    }
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(owner.get(site, OTHERS), []).append(site)
    return groups


def _site_gain(plan: PrecisionPlan, gain: Gain) -> SiteGain:
    site = next(site for site in plan.sites if site.site == gain.name)
    return SiteGain(gain.name, *_formats(plan, site), gain.gain)


def _halves(site: SiteGain, trial: _Trial) -> SiteGain:
    weights = trial.gain({site.site: "weights"}) if site.weights != "none" else 0.0
    activations = trial.gain({site.site: "activations"}) if site.activations != "none" else 0.0
    return replace(site, weights_gain=weights, activations_gain=activations)


def _part_of(change: Change) -> Part:
    if change.weights is None:
        return "activations"
    return "weights" if change.activations is None else "both"


def _changed(site: SitePlan, change: Change) -> SitePlan:
    point = None if change.activations == "none" else site.act_point
    return replace(site, weights=change.weights or site.weights, act_point=point, rule="bisection")


def _formats(plan: PrecisionPlan, site: SitePlan) -> tuple[str, str]:
    return site.weights, "none" if site.act_point is None else plan.point(site.act_point).activations


def _bits(name: str) -> float:
    fmt: Any = format_by_name(name)
    return FLOAT_BITS if fmt is None else float(fmt.bits)
