"""The pictures that a denoiser draws under the deployed sampling, and what each quantizer by itself does to them.

A layer's score of sensitivity says what its weights are worth to one call; what a viewer sees is the picture at the
schedule's end. So here one quantizer at a time is switched on and the pictures are drawn by the real sampler.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np

from s2p_deploy.calib.pictures import autoencoder_on, changed_pictures
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
from s2p_deploy.calib.starting_scales import weight_scale
from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.calib.trajectories import final_latents, trajectory_inputs
from s2p_deploy.families.pictures import latent_pictures
from s2p_deploy.metrics import psnr_db
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records import PrecisionPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.calib.trajectories import Denoise, FloatPipeline, TrajectoryInputs
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import PromptSet

LATENTS = "latents"
RELIEVED = "target"  # rule of a layer that was left in higher precision
KINDS = ("activations", "weights")
_WIDER = "int8"  # what INT4 weights become


@dataclass(frozen=True)
class Relief:
    """What can be left in higher precision: an activation quantizer's tensor, or a layer's INT4 weights."""

    kind: Literal["activations", "weights"]
    name: str
    layers: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names it in a file."""
        return f"{self.kind} {self.name}"


def reliefs(plan: PrecisionPlan) -> tuple[Relief, ...]:
    """Lists everything of a plan that can be left in higher precision: activations to float, INT4 weights to INT8."""
    activations = (Relief("activations", each.name, each.layers) for each in plan.activation_quantizers)
    weights = (Relief("weights", each.name, (each.name,)) for each in plan.layers if each.weights == "int4")
    return (*activations, *weights)


def relieved(plan: PrecisionPlan, given: Collection[Relief]) -> PrecisionPlan:
    """Returns the plan with some of its :func:`reliefs`."""
    floating = {relief.name for relief in given if relief.kind == "activations"}
    wider = {relief.name for relief in given if relief.kind == "weights"}
    layers = []
    for layer in plan.layers:
        changed = layer
        if layer.activation_quantizer in floating:
            changed = replace(changed, activation_quantizer=None, rule=RELIEVED)
        if layer.name in wider:
            changed = replace(changed, weights=_WIDER, rule=RELIEVED)
        layers.append(changed)
    kept = tuple(quantizer for quantizer in plan.activation_quantizers if quantizer.name not in floating)
    return PrecisionPlan(tuple(layers), kept)


def alone(plan: PrecisionPlan, one: Relief | None) -> PrecisionPlan:
    """Returns the plan in which one quantizer alone is left, or none: a floating-point denoiser's."""
    floating = [replace(layer, weights="none", activation_quantizer=None) for layer in plan.layers]
    if one is None:
        return PrecisionPlan(tuple(floating), ())
    if one.kind == "activations":
        layers = [
            replace(layer, activation_quantizer=one.name) if layer.name in one.layers else layer for layer in floating
        ]
        return PrecisionPlan(tuple(layers), (plan.quantizer(one.name),))
    planned = {layer.name: layer.weights for layer in plan.layers}
    layers = [replace(layer, weights=planned[one.name]) if layer.name == one.name else layer for layer in floating]
    return PrecisionPlan(tuple(layers), ())


def sharing_tensors(denoiser: IndexedDenoiser) -> IndexedDenoiser:
    """Copies the modules of a denoiser, whose tensors both have from then on."""
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in chain(denoiser.parameters(), denoiser.buffers())})


def with_plan(
    state: TrainingState, plan: PrecisionPlan, request: CalibrationRequest, *, bake: bool = True
) -> TrainingState:
    """Makes the state of the same weights and scales under another plan, whose quantizers ``state`` has.

    It shares its tensors with ``state``, but for weights on their grid (``bake``), which are its own. INT4 weights that
    the plan has in INT8 get a scale in closed form.
    """
    own = sharing_tensors(state.denoiser.inner)
    before = {layer.name: layer.weights for layer in state.denoiser.plan.layers}
    scales = state.denoiser.weight_scales()
    for layer in plan.layers:
        fmt = format_by_name(layer.weights)
        if fmt is not None and layer.weights != before[layer.name]:
            weight = state.denoiser.layer(layer.name).get_parameter("weight").detach()
            scales[layer.name] = weight_scale(weight, fmt, request.recipe.scales)
    hooks = request.hooks
    denoiser = QuantizedDenoiser(
        own, plan, scales, bake=bake, weight_format=hooks.weight_format, input_quantizer=hooks.input_quantizer
    )
    names = state.denoiser.plan.quantizer_names()
    columns = [names.index(name) for name in plan.quantizer_names()]
    act_scales = hooks.act_scales(request.recipe, plan, state.act_scales.table()[:, columns])
    made = TrainingState(denoiser, act_scales, state.calibrated, state.samples_per_call)
    made.modules().to(state.device).eval()
    return made


@dataclass(frozen=True)
class Drawing:
    """Prompts to draw, and the last latents float32 [n, C, H, W] where the floating-point denoiser takes them."""

    pipe: DiffusionPipeline
    inputs: TrajectoryInputs
    reference: Tensor

    @staticmethod
    def of(
        source: FloatPipeline, prompts: PromptSet, request: CalibrationRequest, drawn: Mapping[str, Tensor]
    ) -> Drawing:
        """Prepares ``prompts`` under the deployed sampling; ``drawn`` is :func:`drawn_in_float` of them."""
        started = {name: tensor for name, tensor in drawn.items() if name != LATENTS}
        return Drawing(source.pipe, trajectory_inputs(source, prompts, request.recipe, **started), drawn[LATENTS])

    def __getitem__(self, some: slice) -> Drawing:
        """Takes some of the prompts."""
        return Drawing(self.pipe, self.inputs[some], self.reference[some])

    def pairs(self, denoise: Denoise) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Draws with ``denoise``; yields every floating-point picture with its own, both float32 [1, H, W, 3]."""
        drawn = final_latents(denoise, self.inputs)
        with autoencoder_on(self.pipe, drawn.device):
            for pair in zip(self.reference, drawn, strict=True):
                first, second = (_picture(self.pipe, latents) for latents in pair)
                yield first, second

    def metric(
        self, denoise: Denoise, *metrics: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Computes metrics float64 [metrics, n] of the pictures that ``denoise`` draws."""
        values = [[metric(*pair)[0] for metric in metrics] for pair in self.pairs(denoise)]
        return np.array(values, dtype=np.float64).reshape(-1, len(metrics)).T


def drawn_in_float(
    source: FloatPipeline, state: TrainingState, prompts: PromptSet, request: CalibrationRequest
) -> dict[str, Tensor]:
    """Draws ``prompts`` with nothing quantized; returns the last :data:`LATENTS` float32 [n, C, H, W], on the CPU.

    Beside them is what :func:`changed_pictures` has for a pipeline that changes pictures. ``state`` is as it was before
    training.
    """
    denoise = with_plan(state, alone(state.denoiser.plan, None), request).predict
    started = changed_pictures(source, denoise, prompts, request.recipe)
    inputs = trajectory_inputs(source, prompts, request.recipe, **started)
    return started | {LATENTS: final_latents(denoise, inputs).cpu()}


def error_alone(
    state: TrainingState, one: Relief, drawing: Drawing, request: CalibrationRequest
) -> NDArray[np.float64]:
    """Computes the pictures' squared errors float64 [n] where one quantizer of ``state`` is the only one.

    ``state`` is as it was before training: its weights are the pipeline's.
    """
    only = with_plan(state, alone(state.denoiser.plan, one), request)
    errors: NDArray[np.float64] = 10 ** (-drawing.metric(only.predict, psnr_db)[0] / 10)
    return errors


def _picture(pipe: DiffusionPipeline, latents: Tensor) -> NDArray[np.float32]:
    picture: NDArray[np.float32] = latent_pictures(pipe, latents[None]).permute(0, 2, 3, 1).numpy()
    return picture
