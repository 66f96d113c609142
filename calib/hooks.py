"""Hooks: the seams of a calibration at which another method replaces the product's own.

Comparisons with other methods need other grids, losses and scales. They bring them here, as functions and classes of
their own package; nothing in this one knows them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from s2p_deploy.calib.losses import OutputLoss
from s2p_deploy.calib.plan import Transforms, split_shortcuts
from s2p_deploy.calib.quantized_denoiser import InputQuantizer, weight_format
from s2p_deploy.calib.samples import BatchOrder
from s2p_deploy.calib.starting_scales import closed_form_scales
from s2p_deploy.calib.training import cosine
from s2p_deploy.calib.training_state import ActScales, TrainingState, trained_scales
from s2p_deploy.calib.trajectories import FloatPipeline, uniform_calls

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import Tensor

    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.recipe import Recipe, Training
    from s2p_deploy.records import LatentDataset, LayerPlan, PrecisionPlan, Prompt, TimestepTable, TimeTable


def same_plan(
    request: CalibrationRequest, denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> PrecisionPlan:
    """Keeps a plan as it is."""
    del request, denoiser, dataset
    return plan


def output_loss(
    request: CalibrationRequest,
    source: FloatPipeline,
    teacher: IndexedDenoiser | None,
    state: TrainingState,
    dataset: LatentDataset,
) -> OutputLoss:
    """Makes the loss that the recipe names."""
    del source, teacher, state, dataset
    return OutputLoss(request.recipe.training)


def denoiser_weights(folder: Path, state: TrainingState, timesteps: TimestepTable) -> dict[str, Tensor]:
    """Returns the tensors of ``weights.safetensors``."""
    del folder, timesteps
    return state.denoiser.inner_state()


@dataclass(frozen=True)
class Hooks:
    """Functions and classes that a calibration calls; the defaults are the product's.

    Args:
        research: what of the result no engine can run, in words; such a model can be opened by its makers only.
        stored_calls: chooses the calls of a prompt that the dataset stores, from the recipe and the number of calls.
        time_table: makes the deployed time table from the network and the number of timesteps; None: the exact one.
        transforms: rewrites the denoiser before it is planned.
        refined_plan: changes the plan after rules and mixed precision; ``denoiser`` is in floating point.
        weight_format: the integer format of a layer's weights.
        input_quantizer: quantizes a layer's input; takes the layer's name and its activation format.
        starting_scales: finds weight scales by layer, and activation scales [calibrated, quantizers] (or whatever
            ``act_scales`` takes).
        act_scales: makes the trained activation scales from the starting ones.
        loss: makes L_out; ``state`` is as it starts.
        needs_teacher: whether ``loss`` takes a copy of the floating-point denoiser.
        batch_order: decides which samples an iteration sees.
        learning_rate: the factor of all rates, from the iteration and the number of iterations.
        stored_weights: returns the tensors of ``weights.safetensors``; may write files of its own to the folder.
    """

    research: str = ""
    stored_calls: Callable[[Recipe, Prompt, int], tuple[int, ...]] = uniform_calls
    time_table: Callable[[torch.nn.Module, int], TimeTable] | None = None
    transforms: Callable[[IndexedDenoiser, Recipe], Transforms] = split_shortcuts
    refined_plan: Callable[[CalibrationRequest, IndexedDenoiser, PrecisionPlan, LatentDataset], PrecisionPlan] = (
        same_plan
    )
    weight_format: Callable[[LayerPlan], IntegerFormat | None] = weight_format
    input_quantizer: Callable[[str, IntegerFormat], InputQuantizer] = InputQuantizer
    starting_scales: Callable[
        [CalibrationRequest, FloatPipeline, PrecisionPlan, LatentDataset], tuple[dict[str, Tensor], Tensor]
    ] = closed_form_scales
    act_scales: Callable[[Recipe, PrecisionPlan, Tensor], ActScales] = trained_scales
    loss: Callable[
        [CalibrationRequest, FloatPipeline, IndexedDenoiser | None, TrainingState, LatentDataset], OutputLoss
    ] = output_loss
    needs_teacher: bool = False
    batch_order: Callable[[LatentDataset, Tensor, Training], BatchOrder] = BatchOrder
    learning_rate: Callable[[int, int], float] = cosine
    stored_weights: Callable[[Path, TrainingState, TimestepTable], dict[str, Tensor]] = denoiser_weights

    def replaced(self) -> dict[str, str]:
        """Names the functions and classes that are not the product's, by hook. Two of one name cannot be told apart."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        methods = {
            name: getattr(value, "func", value)  # of a partial
            for name, value in given.items()
            if callable(value) and value is not getattr(type(self), name)
        }
        named = {name: method if hasattr(method, "__qualname__") else type(method) for name, method in methods.items()}
        return {name: f"{method.__module__}.{method.__qualname__}" for name, method in named.items()}


PRODUCT = Hooks()
