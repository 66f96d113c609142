"""A target of fidelity: the cheapest layers are left in higher precision until the pictures are close enough.

Three sets of prompts, none of which calibrated anything: ``ranked`` ones say what each quantizer by itself does to the
pictures, ``searched`` ones (the same and more) how many quantizers have to go, and ``verified`` ones, which decided
nothing, whether it is so. Where it is not, they join the search, and others verify once more.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from s2p_deploy.calib.picture_error import (
    KINDS,
    Drawing,
    alone,
    drawn_in_float,
    error_alone,
    reliefs,
    relieved,
    with_plan,
)
from s2p_deploy.calib.trajectories import call_with_zeros, sampler_of, seconds_of_call
from s2p_deploy.context import duration
from s2p_deploy.errors import GateFailedError, InputError
from s2p_deploy.families import text_tokens
from s2p_deploy.metric_networks import LPIPS, Lpips, load_weights, lpips_distances
from s2p_deploy.metrics import STATISTICS, certain_statistic, picture_statistic, psnr_db, ssim, to_bytes
from s2p_deploy.records import PromptSet, Skipped
from s2p_deploy.records.files import write_tensors, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.calib.picture_error import Relief
    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.calib.training_state import TrainingState
    from s2p_deploy.calib.trajectories import FloatPipeline
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.metric_networks import MetricWeights
    from s2p_deploy.recipe import Recipe, Target
    from s2p_deploy.records import PrecisionPlan

    Metric = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float64]]
    Statistic = Callable[[NDArray[np.float64], str], float]

_LATENTS, _TRIALS = "picture_latents.safetensors", "target_trials.json"
_ROUNDS = 2  # of verification
_LESS_IS_BETTER = frozenset({"lpips"})
# A step's time by multiplications alone: a floating-point product takes as long as two of INT8, on tensor cores as with
# VNNI. A switch of precision is a pass over an activation, whatever the layer. Wider weights are read, not multiplied.
_SWITCH = 0.001
_READING = 0.1


def target_prompts(recipe: Recipe, prompts: PromptSet) -> PromptSet:
    """Takes the prompts that follow those of dataset and selection, for the target or for mixed precision by picture.

    Raises:
        InputError: there are too few.
    """
    target, first = recipe.target, recipe.dataset.prompts + recipe.training.selection.prompts
    needed = max(target.searched, target.ranked) + target.verified if target.limits else 0
    if recipe.mixed.sensitivity == "pictures":
        needed = max(needed, recipe.mixed.prompts)
    if not needed:
        return PromptSet(())
    rest = prompts.prompts[first:]
    if len(rest) < needed:
        raise InputError(
            f"recipe {recipe.name} draws {needed} prompts behind the {first} that calibrate, of {len(prompts.prompts)}:"
            " give more prompts, or lower target.searched, target.verified or dataset.prompts"
        )
    return PromptSet(rest[: needed + (_ROUNDS - 1) * target.verified * bool(target.limits)])


@dataclass(frozen=True)
class SearchTime:
    """What a search for a target takes: pictures to draw, each in ``calls`` calls of the denoiser."""

    pictures: int
    calls: int
    seconds: float
    stage: ClassVar[str] = "target"

    def __str__(self) -> str:
        return f"{self.pictures} pictures to draw, of {self.calls} denoiser calls each; about {duration(self.seconds)}"


def search_time(request: CalibrationRequest, source: FloatPipeline, plan: PrecisionPlan) -> SearchTime:
    """Estimates the search of a plan from one forward pass of the floating-point denoiser."""
    target, count = request.recipe.target, len(reliefs(plan))
    pictures = (
        target.ranked * count
        + target.searched * (1 + _bisections(count))
        + len(request.judged.prompts)
        + target.verified
    )
    width = request.recipe.dataset.width
    tokens = text_tokens(source.pipe, request.recipe.sampling.max_sequence_length)
    seconds = seconds_of_call(source.denoiser, tokens, 2 * width, request.context.samples_per_call) / width
    calls = len(sampler_of(source.pipe, source.timesteps, request.recipe.sampling.steps).indices)
    return SearchTime(pictures, calls, pictures * calls * seconds)


def _bisections(count: int) -> int:
    """Counts the trials that find the fewest of so many quantizers."""
    return 1 + math.ceil(math.log2(count + 1))


@dataclass(frozen=True)
class Ranking:
    """What each quantizer by itself does to the pictures.

    ``errors`` float64 [ranked] by :attr:`Relief.key`; ``drawn`` is :func:`drawn_in_float` of all prompts of the search.
    """

    errors: dict[str, NDArray[np.float64]]
    drawn: dict[str, Tensor]

    def of_layers(self, plan: PrecisionPlan) -> dict[str, float]:
        """Computes the mean squared error of the pictures by layer, of what was measured of it."""
        found = dict.fromkeys((layer.name for layer in plan.layers), 0.0)
        for relief in (each for each in reliefs(plan) if each.key in self.errors):
            for layer in relief.layers:
                found[layer] += float(self.errors[relief.key].mean())
        return found


def with_errors(plan: PrecisionPlan, ranking: Ranking) -> PrecisionPlan:
    """Returns the plan with every layer's error of the pictures."""
    errors = ranking.of_layers(plan)
    return replace(plan, layers=tuple(replace(layer, picture_error=errors[layer.name]) for layer in plan.layers))


def rank_by_picture(
    request: CalibrationRequest,
    source: FloatPipeline,
    state: TrainingState,
    count: int,
    purpose: Literal["mixed", "target"] = "target",
    kinds: Collection[str] = KINDS,
) -> Ranking:
    """Measures what each quantizer of ``state`` does to the pictures of the first ``count`` prompts of the search.

    ``kinds`` says which quantizers: of activations, INT4 weights, or both.

    ``state`` is as it was before training. What is measured is kept in the work folder, so that a killed run goes on;
    by its ``purpose``, because mixed precision ranks another plan than the target that follows it.
    """
    folder, progress = request.partial, request.context.progress
    latents = folder / _LATENTS
    if not latents.exists():
        write_tensors(latents, drawn_in_float(source, state, request.judged, request))
    drawn = load_file(latents)
    drawing = Drawing.of(source, request.judged, request, drawn)[:count]
    file = folder / f"{purpose}_picture_errors.json"
    errors = _read(file)
    all_reliefs = [relief for relief in reliefs(state.denoiser.plan) if relief.kind in kinds]
    for done, relief in enumerate(all_reliefs):
        progress("sensitivity by picture", done, len(all_reliefs))
        if relief.key not in errors:
            errors[relief.key] = error_alone(state, relief, drawing, request).tolist()
            write_text(file, json.dumps(errors, indent=1) + "\n")
    progress("sensitivity by picture", len(all_reliefs), len(all_reliefs))
    return Ranking({key: np.array(values) for key, values in errors.items()}, drawn)


@dataclass(frozen=True)
class Costs:
    """What a step's time becomes where layers are relieved, as shares of the whole step.

    ``of`` maps :attr:`Relief.key` to the time that it adds, ``products`` to its share of the multiplications.
    """

    of: dict[str, float]
    products: dict[str, float]

    def spared(self, target: Target, by_key: Mapping[str, Relief]) -> dict[str, float]:
        """Returns the costs of what a target spares: time, or layers."""
        if target.cost == "time":
            return self.of
        return {key: float(len(relief.layers)) for key, relief in by_key.items()}


def shares_of_products(denoiser: IndexedDenoiser, plan: PrecisionPlan, tokens: int) -> dict[str, float]:
    """Counts every layer's share of the multiplications of one call, attention included."""
    counter = FlopCounterMode(display=False)
    with counter:
        call_with_zeros(denoiser, tokens, 1)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    return {layer.name: _ending(counts, layer.name) / counts["Global"] for layer in plan.layers}


def costs_by_products(denoiser: IndexedDenoiser, plan: PrecisionPlan, tokens: int) -> Costs:
    """Counts the multiplications of one call, of layers and attention, and derives costs from them alone."""
    by_layer = shares_of_products(denoiser, plan, tokens)
    weights = {name: denoiser.network.get_submodule(name).get_parameter("weight") for name in by_layer}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    all_weights = sum(sizes.values())
    quantized = {name for quantizer in plan.activation_quantizers for name in quantizer.layers}
    step = sum(share * (1 if name in quantized else 2) for name, share in by_layer.items())
    step += 2 * (1 - sum(by_layer.values()))
    added, products = {}, {}
    for relief in reliefs(plan):
        products[relief.key] = sum(by_layer[name] for name in relief.layers)
        own = products[relief.key] / step + _SWITCH
        if relief.kind == "weights":
            own = _READING * sizes[relief.name] / all_weights + _SWITCH
        added[relief.key] = own
    return Costs(added, products)


def ordered(
    ranking: Mapping[str, NDArray[np.float64]], floor: NDArray[np.float64], costs: Mapping[str, float]
) -> list[str]:
    """Orders quantizers by what leaving each out gives, in dB of the mean PSNR, per cost.

    Errors of single quantizers add up, nearly. So the gain of one depends on those that are left out already, and is
    computed anew after each.

    Args:
        ranking: squared errors [n] of each by itself.
        floor: squared errors [n] of all that cannot be left out.
        costs: of each, above 0.
    """
    left, total, order = dict(ranking), floor + sum(ranking.values()), []
    while left:
        gains = {
            key: float(np.log(total / np.maximum(total - errors, floor)).mean()) / costs[key]
            for key, errors in left.items()
        }
        best = max(gains, key=lambda key: gains[key])
        order.append(best)
        total = np.maximum(total - left.pop(best), floor)
    return order


def fewest(enough: Callable[[int], bool], most: int, start: int) -> int | None:
    """Finds the smallest count up to ``most`` that is ``enough``, as all above it are; None: none is.

    It looks at ``start`` first, goes on in growing strides, and halves what is left.
    """
    low, high, count, stride = -1, most + 1, start, 1
    while high - low > 1:
        if enough(count):
            high, count = count, count - stride
        else:
            low, count = count, count + stride
        stride *= 2
        if not low < count < high:
            count = (low + high) // 2
    return high if high <= most else None


@dataclass(frozen=True)
class Reached:
    """A target that was reached: what was relieved, what it costs, and the pictures that decided nothing.

    ``statistics`` by metric and then by statistic; ``relieved`` are keys of :class:`Relief`.
    """

    target: dict[str, Any]
    relieved: tuple[str, ...]
    layers: tuple[int, int]
    wider: int
    products: float
    step: float
    prompts: int
    statistics: dict[str, dict[str, float]]

    def __str__(self) -> str:
        measured = "; ".join(
            f"{name.upper()} "
            + ", ".join(f"{_written(name, values[at])} {_plain(words)}" for at, words in STATISTICS.items())
            for name, values in self.statistics.items()
        )
        return (
            f"{measured} over {self.prompts} prompts that decided nothing; {self.layers[0]} of {self.layers[1]} layers"
            f" in A16, {self.products:.0%} of the multiplications"
            + (f"; {self.wider} layers in W8" if self.wider else "")
            + f"; predicted step {self.step:.2f} ×"
        )


def reach_target(
    request: CalibrationRequest, source: FloatPipeline, state: TrainingState, ranking: Ranking
) -> tuple[TrainingState, Reached]:
    """Relieves as few quantizers of ``state`` as its recipe's target needs; returns the new state.

    Raises:
        GateFailedError: the target cannot be reached, or was not where other prompts verified it.
    """
    return _Search(request, source, state, ranking).run()


class _Search:
    def __init__(
        self, request: CalibrationRequest, source: FloatPipeline, state: TrainingState, ranking: Ranking
    ) -> None:
        self.request, self.state = request, state
        self.target: Target = request.recipe.target
        self.others = request.recipe.validation.pictures
        self.drawing = Drawing.of(source, request.judged, request, ranking.drawn)
        self.metrics = _metrics(request, state.device)
        self.file = request.partial / _TRIALS
        self.trials: dict[str, Any] = _read(self.file)
        plan = state.denoiser.plan
        self.by_key = {relief.key: relief for relief in reliefs(plan)}
        tokens = text_tokens(source.pipe, request.recipe.sampling.max_sequence_length)
        floating = with_plan(state, alone(plan, None), request).denoiser.inner
        self.costs = costs_by_products(floating, plan, tokens)
        floor = 10 ** (-np.array(self.measured(tuple(self.by_key), 0, self.target.ranked)["psnr"]) / 10)
        self.order = ordered(ranking.errors, floor, self.costs.spared(self.target, self.by_key))
        self.expected = self._expected(ranking.errors, floor)

    def run(self) -> tuple[TrainingState, Reached]:
        start, end = 0, max(self.target.searched, self.target.ranked)
        for _ in range(_ROUNDS):
            count = self.fewest(end)
            verified = min(end + self.target.verified, len(self.drawing.reference))
            found = self.measured(self.order[:count], end, verified)
            if self.holds(found):
                return self.result(count, found)
            start, end = end, verified
            if end == len(self.drawing.reference):
                break
        raise GateFailedError(
            f"the target of {self.asked()} was reached on {start} prompts and not on {end - start} others, where it is"
            f" {self.said(found)}: ask for a little more, or give more prompts"
        )

    def fewest(self, end: int) -> int:
        """Finds how many quantizers have to go, in order, for new prompts to hold by what the first ``end`` say."""

        def enough(count: int) -> bool:
            return self.holds(self.measured(self.order[:count], 0, end), self.certain)

        found = fewest(enough, len(self.order), self.expected)
        if found is None:
            best = self.measured(self.order, 0, end)
            raise GateFailedError(
                f"the target of {self.asked()} cannot be reached: with every activation in floating point"
                f"{' and every weight in INT8' if any(k.startswith('weights') for k in self.order) else ''} it is"
                f" {self.said(best, self.certain)} in four of five draws of {self.others} new prompts; ask for less"
            )
        return found

    def _expected(self, errors: Mapping[str, NDArray[np.float64]], floor: NDArray[np.float64]) -> int:
        """Finds how many quantizers would have to go if errors added up; half of them where PSNR is not asked for."""
        if self.target.psnr is None:
            return len(self.order) // 2
        left = floor + sum(errors.values())
        for count, key in enumerate(self.order):
            if self.certain(-10 * np.log10(left), self.target.at) >= self.target.psnr:
                return count
            left = np.maximum(left - errors[key], floor)
        return len(self.order)

    def certain(self, values: NDArray[np.float64], at: str) -> float:
        """Computes what a statistic exceeds, four times in five, on as many new prompts as a validation draws."""
        return certain_statistic(values, at, self.others)

    def measured(self, keys: Sequence[str], start: int, end: int) -> dict[str, list[float]]:
        """Measures the pictures of the prompts from ``start`` to ``end`` with some quantizers left out."""
        name = f"{start} to {end} without " + (", ".join(sorted(keys)) or "any")
        if name not in self.trials:
            plan = relieved(self.state.denoiser.plan, [self.by_key[key] for key in keys])
            made = with_plan(self.state, plan, self.request)
            values = self.drawing[start:end].metric(made.predict, *self.metrics.values())
            self.trials[name] = dict(zip(self.metrics, values.tolist(), strict=True))
            write_text(self.file, json.dumps(self.trials, indent=1) + "\n")
        done = len(self.trials)  # of the floor, the bisection and one verification, unless others have to verify
        self.request.context.progress("target", done, max(done, _bisections(len(self.by_key)) + 3))
        found: dict[str, list[float]] = self.trials[name]
        return found

    def holds(self, found: Mapping[str, list[float]], statistic: Statistic = picture_statistic) -> bool:
        """Tells whether all limits are kept."""
        limits = self.target.limits
        return all(
            self.value(found, name, statistic) <= limit
            if name in _LESS_IS_BETTER
            else self.value(found, name, statistic) >= limit
            for name, limit in limits.items()
        )

    def value(self, found: Mapping[str, list[float]], name: str, statistic: Statistic = picture_statistic) -> float:
        """Computes a metric's statistic that the target asks for."""
        return _statistic(found, name, self.target.at, statistic)

    def asked(self) -> str:
        """Says what the target is."""
        limits = (f"{name.upper()} {_written(name, limit)}" for name, limit in self.target.limits.items())
        return f"{' and '.join(limits)} at the {_plain(STATISTICS[self.target.at])}"

    def said(self, found: Mapping[str, list[float]], statistic: Statistic = picture_statistic) -> str:
        """Says what was measured in the target's terms."""
        return " and ".join(_written(name, self.value(found, name, statistic)) for name in self.target.limits)

    def result(self, count: int, found: Mapping[str, list[float]]) -> tuple[TrainingState, Reached]:
        keys = self.order[:count]
        plan = self.state.denoiser.plan
        chosen = [self.by_key[key] for key in keys]
        floating = [relief for relief in chosen if relief.kind == "activations"]
        state = with_plan(self.state, relieved(plan, chosen), self.request, bake=False)
        reached = Reached(
            target=self.target.model_dump(mode="json"),
            relieved=tuple(keys),
            layers=(
                sum(len(relief.layers) for relief in floating),
                sum(len(quantizer.layers) for quantizer in plan.activation_quantizers),
            ),
            wider=len(chosen) - len(floating),
            products=sum(self.costs.products[relief.key] for relief in floating),
            step=1 + sum(self.costs.of[key] for key in keys),
            prompts=len(found["psnr"]),
            statistics={
                name: {at: _statistic(found, name, at, picture_statistic) for at in STATISTICS}
                for name in self.target.limits
            },
        )
        return state, reached


def _metrics(request: CalibrationRequest, device: torch.device) -> dict[str, Metric]:
    """Makes PSNR, SSIM, and where the target asks for it and weights are given, LPIPS.

    Raises:
        InputError: LPIPS is asked for, and its weights are not given, or the pictures are too small for it.
    """
    metrics: dict[str, Metric] = {"psnr": psnr_db, "ssim": ssim}
    if request.recipe.target.lpips is not None:
        file = lpips_file(request.weights)
        network = load_weights(Lpips(), file).to(device)
        metrics["lpips"] = lambda first, second: lpips_distances(network, to_bytes(first), to_bytes(second), device)
    return metrics


def lpips_file(weights: MetricWeights | None) -> Path:
    """Finds the weights of LPIPS. Raises InputError where they are not given."""
    file = None if weights is None else weights.place(LPIPS)
    if file is None or isinstance(file, Skipped):
        raise InputError(f"a target of LPIPS needs its weights: pass --weights-dir with a folder that has {LPIPS}")
    return file


def _statistic(found: Mapping[str, list[float]], name: str, at: str, statistic: Statistic) -> float:
    sign = -1 if name in _LESS_IS_BETTER else 1
    return sign * statistic(sign * np.array(found[name]), at)


def _written(name: str, value: float) -> str:
    return f"{value:.4g} dB" if name == "psnr" else f"{value:.4g}"


def _plain(words: str) -> str:
    return words.removesuffix(" of")


def _ending(counts: Mapping[str, int], name: str) -> int:
    """Finds the count of a layer, whose module path begins with the class of the outermost module."""
    found = [count for path, count in counts.items() if path.endswith(f".network.{name}") or path == name]
    return max(found, default=0)


def _read(file: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return stored
