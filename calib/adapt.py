"""The stage that puts LoRAs into a calibrated model: it keeps plan and activation scales, and fits weights again.

What a calibration learnt of a weight stays: its difference from the pipeline's is added to the fused weight. Where it
learnt nothing, the fused pipeline's own weights come out, as its calibration would have them. Scales of touched weights
are found in closed form. One tensor of each pipeline is in memory at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.fused_pipeline import fused_loras
from s2p_deploy.calib.model_files import WEIGHT_SCALES, WEIGHTS
from s2p_deploy.calib.quantized_denoiser import WeightQuantizer, product_of_rounding
from s2p_deploy.calib.request import KIND
from s2p_deploy.calib.starting_scales import weight_scale
from s2p_deploy.calib.streaming import DenoiserWeights, shifted_sources, split_sources
from s2p_deploy.context import Context
from s2p_deploy.families import check_base, indexed_skeleton, load_time_path, shifted_layers
from s2p_deploy.families.checkpoint import DTYPES, Checkpoint, TensorForm
from s2p_deploy.families.streamed_tensors import write_tensor_file
from s2p_deploy.families.time_path import table_of_path
from s2p_deploy.numerics import format_by_name
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import CalibratedModel, check_vacant, write_artifact
from s2p_deploy.records.artifacts import copy_verified
from s2p_deploy.records.calibrated_model import parameter_name
from s2p_deploy.records.files import check_room, write_tensors
from s2p_deploy.records.tensor_file import TensorFile

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.numerics import IntegerFormat

TIME_TABLE = "time_table.safetensors"
_KEPT = ("act_scales.safetensors", "timesteps.json", "plan.yaml", "denoiser_config.json")
_OF_DATASET = {"dataset", "training"}  # content that tells of a training which this model did not go through


def adapt(
    calibrated: CalibratedModel,
    base: BasePipeline,
    fused: BasePipeline,
    out: Path,
    *,
    replace: bool = False,
    context: Context = Context(),
) -> CalibratedModel:
    """Writes the calibrated model of ``fused``, from that of ``base``, whose weights have no LoRAs yet.

    Args:
        calibrated: the model to start from.
        base: the pipeline that it was made from.
        fused: the same pipeline with LoRAs in its weights.
        out: folder of the artifact.
        replace: whether an artifact at ``out`` may be replaced.
        context: its progress is called after every tensor that is written.

    Raises:
        InputError: ``out`` exists, its disk has no room, or the model was made for a comparison only.
        IntegrityError: the model was not made from ``base``.
    """
    check_vacant(out, KIND, replace=replace, inputs={"calibrated model": calibrated.folder, "pipeline": base.folder})
    calibrated.require_deployable()
    check_base(base, calibrated.manifest)
    context.set_threads()
    stored = TensorFile(calibrated.folder / WEIGHTS)
    kinds = {name: stored.form(name) for name in stored.names}
    forms = {name: TensorForm(DTYPES[kind], shape) for name, (kind, shape) in kinds.items()}
    check_room(out, sum(form.bytes for form in forms.values()) + calibrated.scales.scales.nbytes)

    def fill(folder: Path) -> dict[str, Any]:
        weights = _AdaptedWeights(calibrated, stored, base, fused, context)
        write_tensor_file(folder / WEIGHTS, forms, weights.read)
        write_tensors(folder / WEIGHT_SCALES, weights.scales)
        for name in _KEPT:
            copy_verified(calibrated, name, folder / name)
        if not calibrated.added_width:
            _write_time_table(calibrated, base, fused, folder / TIME_TABLE)
        content = {name: value for name, value in calibrated.manifest.content.items() if name not in _OF_DATASET}
        # with the model as its initial one, no calibration of the fused pipeline takes it for its own result
        identity = {
            "pipeline": fused.base.digest,
            "fused LoRAs": fused_loras(fused),
            "initial model": calibrated.manifest.digest,
        }
        return content | {"request": content.get("request", {}) | identity, "adapted": sorted(weights.touched)}

    write_artifact(
        out,
        kind=KIND,
        base=fused.base,
        recipe=calibrated.manifest.recipe,
        fill=fill,
        parents={"adapted_from": (calibrated.folder, calibrated.manifest)},
        replace=replace,
    )
    return CalibratedModel.open(out)


class _AdaptedWeights:
    """The tensors of the adapted model, each made when it is asked for.

    Attributes:
        scales: weight scales float32 [out, 1, ...] by layer; those of touched layers once their weights were read.
        touched: layers whose weights differ from the model's.
    """

    def __init__(
        self,
        calibrated: CalibratedModel,
        stored: TensorFile,
        base: BasePipeline,
        fused: BasePipeline,
        context: Context,
    ) -> None:
        self.scales = {name: torch.from_numpy(scale) for name, scale in calibrated.weight_scales().items()}
        self._own_scales = dict(self.scales)
        self.touched: set[str] = set()
        self._stored, self._progress = stored, context.progress
        self._before, self._after = (_PipelineWeights(calibrated, stored, each) for each in (base, fused))
        self._formats = {
            parameter_name(f"{layer.name}.weight"): (layer.name, fmt)
            for layer in calibrated.plan.layers
            if (fmt := format_by_name(layer.weights)) is not None
        }
        # biases of shifted layers: what their inputs lost, and the weight whose codes' product with it they hold
        self._shifted = {
            parameter_name(f"{layer}.bias"): (stored.read(parameter_name(f"{path}.shift")), weight)
            for layer, path in shifted_layers(calibrated.transforms).items()
            if (weight := parameter_name(f"{layer}.weight")) in self._formats
        }
        self._recipe = recipe_from_data(calibrated.manifest.recipe, str(calibrated.folder)).scales
        if self._recipe.calibrator != "own":  # modelopt's scales are of the largest magnitudes
            self._recipe = self._recipe.model_copy(update={"weights": "max"})
        self._done = 0

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Makes a tensor in the model's own dtype; of a quantized layer's weight the scale too."""
        self._done += 1
        self._progress("fit weights", self._done, len(self._stored.names))
        own = self._stored.read(name)
        adapted = self._adapted(name, own)
        if adapted is not own and name in self._formats:
            layer, fmt = self._formats[name]
            self.touched.add(layer)
            self.scales[layer] = self._scale(adapted, fmt)
        return adapted

    def _adapted(self, name: str, own: Tensor) -> Tensor:
        """Makes a tensor; the model's ``own`` itself where the LoRAs leave it."""
        if not self._before.has(name):
            return own
        before, after = self._before.read(name), self._after.read(name)
        if torch.equal(before, after):
            return own
        # in this order nothing is rounded where the model has the pipeline's own tensor
        if name not in self._shifted:
            return (after.float() + (own.float() - before.float())).to(own.dtype)
        rounding_before, rounding_after = self._roundings(*self._shifted[name])
        return after + (own - (before + rounding_before)) + rounding_after

    def _roundings(self, shift: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Computes what rounding adds to a bias that a shift went into, of the model's own weight and the adapted."""
        own = self._stored.read(name)
        adapted = self._adapted(name, own)
        layer, fmt = self._formats[name]
        return (
            product_of_rounding(own.float(), self._own_scales[layer], fmt, shift),
            product_of_rounding(adapted.float(), self._scale(adapted, fmt), fmt, shift),
        )

    def _scale(self, weight: Tensor, fmt: IntegerFormat) -> Tensor:
        return WeightQuantizer(weight_scale(weight, fmt, self._recipe), fmt).scale.detach()


class _PipelineWeights:
    """A pipeline's weights as a calibrated model's transforms rewrite them, by their names in the model."""

    def __init__(self, calibrated: CalibratedModel, stored: TensorFile, pipeline: BasePipeline) -> None:
        """Reads no tensor. Raises InputError where the pipeline is not of the model's sizes."""
        spec = calibrated.transforms
        skeleton = indexed_skeleton(calibrated.denoiser_config(), calibrated.time_source())
        plain = {name: tuple(tensor.shape) for name, tensor in skeleton.denoiser.state_dict().items()}
        sources = shifted_sources(split_sources(skeleton.sources, plain, spec.split), (*spec.smoothed, *spec.shifted))
        factors = {path: parameter_name(f"{path}.factor") for path in spec.smoothed}
        shapes = {name: stored.form(name)[1] for name in stored.names if name not in factors.values()}
        shifts = {path: stored.read(parameter_name(f"{path}.shift")) for path in spec.shifts}
        self._weights = DenoiserWeights(
            Checkpoint(pipeline.denoiser_folder), sources, shapes, shifts, spec.shifted_norms
        )
        self._factors = {parameter_name(f"{path}.layer.weight"): stored.read(name) for path, name in factors.items()}

    def has(self, name: str) -> bool:
        """Tells a tensor of the pipeline from one that a calibration made, such as a factor of smoothing."""
        return name in self._weights.forms

    def read(self, name: str) -> Tensor:
        """Reads or makes a tensor."""
        tensor = self._weights.read(name)
        if name not in self._factors:
            return tensor
        return tensor.float() * self._factors[name]


def _write_time_table(calibrated: CalibratedModel, base: BasePipeline, fused: BasePipeline, file: Path) -> None:
    """Keeps the model's table, or computes that of ``fused`` where a LoRA touches the time path."""
    before, after = load_time_path(base), load_time_path(fused)
    touched = any(not torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    if not touched:
        return copy_verified(calibrated, TIME_TABLE, file)
    table = table_of_path(after, len(calibrated.timesteps.angle))
    return write_tensors(file, {"time_projections": torch.from_numpy(table.projections)})
