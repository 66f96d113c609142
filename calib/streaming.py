"""The stage for models of any size: a CalibratedModel from the pipeline's files, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.model_files import WEIGHTS, write_model_files
from s2p_deploy.calib.plan import Transforms, planned_layers, split_shortcuts
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser, WeightQuantizer, product_of_rounding
from s2p_deploy.calib.request import KIND
from s2p_deploy.calib.starting_scales import default_scales, given_scales, weight_scale
from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    indexed_skeleton,
    load_pipeline,
    load_time_path,
    product_with_shift,
    shifted_layers,
    text_tokens,
)
from s2p_deploy.families.checkpoint import Checkpoint, TensorForm
from s2p_deploy.families.network_files import check_components, component_classes
from s2p_deploy.families.streamed_tensors import write_tensor_file
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records import TimeTable, write_artifact
from s2p_deploy.records.calibrated_model import parameter_name
from s2p_deploy.records.files import check_room
from s2p_deploy.timesteps import timestep_table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.context import Progress
    from s2p_deploy.families import BasePipeline, IndexedDenoiser
    from s2p_deploy.recipe import Recipe, Scales
    from s2p_deploy.records import CalibratedModel, PrecisionPlan, TimestepTable

_SLACK = 16 * 2**20  # bytes; plans, timesteps and headers


def streams(recipe: Recipe, plan: PrecisionPlan | None) -> bool:
    """Tells recipes that read nothing but weights; ``plan`` replaces the recipe's rules."""
    return not recipe.scales.measured or (recipe.is_float and plan is None)


def stream_model(request: CalibrationRequest) -> None:
    """Writes the CalibratedModel of a recipe that :func:`streams`.

    Weights keep the pipeline's values and dtype. An interrupted run leaves nothing behind and starts anew.

    Raises:
        InputError: the recipe asks for what needs activations; the recipe, the plan or the model whose scales are taken
            does not fit the pipeline; its weights are not whole; there is no room on the disk.
    """
    recipe, progress = request.recipe, request.context.progress
    _check_recipe(request)
    check_components(request.base.folder)
    checkpoint = Checkpoint(request.base.denoiser_folder)
    layout = resolve_layout(request.base, recipe, request.plan)
    shapes = {name: tuple(tensor.shape) for name, tensor in layout.denoiser.state_dict().items()}
    shifts, norms = _shifts(layout, shapes, request.initial), layout.transforms.spec.shifted_norms
    weights = DenoiserWeights(checkpoint, layout.sources, shapes, shifts, norms)
    act_scales, timesteps = default_scales(layout.plan, layout.timesteps), layout.timesteps
    if request.initial is not None:
        act_scales, timesteps = given_scales(layout.plan, layout.timesteps, request.initial)
    # biases that follow the weight's codes, as in QuantizedDenoiser.inner_state
    formats = {layer.name: format_by_name(layer.weights) for layer in layout.plan.layers}
    roundings = {
        parameter_name(f"{layer}.bias"): (shifts[path], layer, fmt)
        for layer, path in shifted_layers(layout.transforms.spec).items()
        if (fmt := formats[layer]) is not None
    }
    check_room(request.out, sum(form.bytes for form in weights.forms.values()) + act_scales.scales.nbytes + _SLACK)

    def fill(folder: Path) -> dict[str, Any]:
        weight_scales = streamed_weight_scales(weights.read, layout.plan, recipe.scales, progress)
        done = 0

        @torch.no_grad()
        def read(name: str) -> Tensor:
            nonlocal done
            tensor = weights.read(name)
            done += 1
            progress("write weights", done, len(weights.forms))
            if name in roundings:
                shift, layer, fmt = roundings[name]
                weight = weights.read(parameter_name(f"{layer}.weight")).float()
                tensor = tensor + product_of_rounding(weight, weight_scales[layer], fmt, shift)
            return tensor

        write_tensor_file(folder / WEIGHTS, weights.forms, read)
        on_meta = {layer: scale.to("meta") for layer, scale in weight_scales.items()}
        return write_model_files(
            folder,
            request,
            QuantizedDenoiser(layout.denoiser, layout.plan, on_meta),
            weight_scales=weight_scales,
            act_scales=act_scales,
            timesteps=timesteps,
            time_table=layout.time_table,
            transforms=layout.transforms.spec,
            tokens=layout.tokens,
        )

    resolved = recipe.model_dump(mode="json")
    write_artifact(request.out, kind=KIND, base=request.base.base, recipe=resolved, fill=fill, replace=request.replace)


def _check_recipe(request: CalibrationRequest) -> None:
    recipe, given = request.recipe, request.initial is not None
    if given != (recipe.scales.activations == "given"):
        remedy = "set it to given to take those of --from" if given else "name the model that has them with --from"
        raise InputError(f"recipe {recipe.name} has scales.activations: {recipe.scales.activations}: {remedy}")
    shift = recipe.transforms.shift
    if request.initial is not None and (shift == "channel") != bool(request.initial.transforms.shifts):
        other = "channel" if shift == "none" else "none"
        raise InputError(
            f"{request.initial.folder} was calibrated with transforms.shift: {other}, and its scales fit that alone:"
            f" set it to {other}"
        )
    if recipe.scales.measured:
        return  # nothing is quantized, so nothing is measured
    needs = {
        "training": recipe.training.iterations > 0,
        "mixed": recipe.mixed.sensitivity != "none",
        "scales.calibrator": recipe.scales.calibrator != "own",
    }
    for key in (key for key, needed in needs.items() if needed):
        raise InputError(
            f"recipe {recipe.name} asks for {key}, which needs stored latents or the whole denoiser: leave it out,"
            " or set scales.activations to mse"
        )


def _shifts(layout: Layout, shapes: Mapping[str, tuple[int, ...]], given: CalibratedModel | None) -> dict[str, Tensor]:
    """Takes the shifts [in] of a model whose scales are taken, by path; placeholders, like the scales, are zero."""
    names = {path: parameter_name(f"{path}.shift") for path in layout.transforms.spec.shifts}
    if given is None:
        return {path: torch.zeros(shapes[name]) for path, name in names.items()}
    shifts = {path: torch.from_numpy(given.tensor(name)) for path, name in names.items()}
    for path, shift in shifts.items():
        if shift.shape != shapes[names[path]]:
            raise InputError(
                f"{given.folder}: {names[path]} is {list(shift.shape)}, here {list(shapes[names[path]])}:"
                " give a model of the same size"
            )
    return shifts


def streamed_weight_scales(
    read: Callable[[str], Tensor], plan: PrecisionPlan, scales: Scales, progress: Progress
) -> dict[str, Tensor]:
    """Computes scales float32 [out, 1, ...] by layer, bit for bit those that other calibrations store untrained.

    ``read`` returns a tensor of the indexed denoiser's state by its name, in any floating-point dtype.
    """
    formats = {layer.name: format_by_name(layer.weights) for layer in plan.layers}
    quantized = {layer: fmt for layer, fmt in formats.items() if fmt is not None}
    computed = {}
    for number, (layer, fmt) in enumerate(quantized.items()):
        scale = weight_scale(read(parameter_name(f"{layer}.weight")), fmt, scales)
        computed[layer] = WeightQuantizer(scale, fmt).scale.detach()  # as models keep them: through their logarithm
        progress("weight scales", number + 1, len(quantized))
    return computed


@dataclass(frozen=True)
class TensorSource:
    """A tensor of the indexed denoiser as one of the pipeline's, or some of its input channels (axis 1)."""

    name: str
    channels: tuple[int, int] | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Computes its shape from that of the pipeline's tensor."""
        if self.channels is None or len(whole) < 2:
            return whole
        start, stop = self.channels
        return (whole[0], max(0, min(stop, whole[1]) - start), *whole[2:])

    def take(self, whole: Tensor) -> Tensor:
        """Takes it from the pipeline's tensor."""
        if self.channels is None:
            return whole
        return whole[:, slice(*self.channels)].clone(memory_format=torch.contiguous_format)


def split_sources(
    sources: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], split: Mapping[str, int]
) -> dict[str, TensorSource]:
    """Finds the sources of a denoiser whose convolutions ``split`` become two; names and shapes are from before.

    See :class:`~s2p_deploy.families.SplitConv2d`: ``head`` has the leading input channels and the bias.
    """
    result = {name: TensorSource(source) for name, source in sources.items()}
    for path, leading in split.items():
        whole = parameter_name(f"{path}.weight")
        source = result.pop(whole).name
        result[parameter_name(f"{path}.head.weight")] = TensorSource(source, (0, leading))
        result[parameter_name(f"{path}.skip.weight")] = TensorSource(source, (leading, shapes[whole][1]))
        bias = result.pop(parameter_name(f"{path}.bias"), None)
        if bias is not None:
            result[parameter_name(f"{path}.head.bias")] = bias
    return result


def shifted_sources(sources: Mapping[str, TensorSource], shifted: Sequence[str]) -> dict[str, TensorSource]:
    """Renames the sources of layers that become a :class:`~s2p_deploy.families.ShiftedLayer`."""
    moved = {
        parameter_name(f"{path}.{name}"): parameter_name(f"{path}.layer.{name}")
        for path in shifted
        for name in ("weight", "bias")
    }
    return {moved.get(name, name): source for name, source in sources.items()}


class DenoiserWeights:
    """The tensors of an indexed denoiser's state, each in the dtype that the pipeline has it in, read one at a time.

    Shifts and the biases that go with them are float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sources: Mapping[str, TensorSource],
        shapes: Mapping[str, tuple[int, ...]],
        shifts: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Checks every tensor's presence, dtype and shape; reads none.

        ``shapes`` are those of the indexed denoiser's state, ``shifts`` [in] by path those of its shifted layers, and
        of its norms, whose readers are in ``norms``.

        Raises:
            InputError: a tensor is missing, of another shape than the configuration's, or not in floating point.
        """
        self._checkpoint, self._sources = checkpoint, sources
        norms = norms or {}
        self._shifts = {parameter_name(f"{path}.shift"): shift for path, shift in (shifts or {}).items()}
        # biases that a shift went into: which, and for those of layers the weight that it is multiplied with
        layers = {f"{path}.layer": path for path in shifts or {} if path not in norms}
        layers |= {reader: norm for norm, readers in norms.items() for reader in readers}
        self._biases = {
            parameter_name(f"{layer}.bias"): (parameter_name(f"{path}.shift"), parameter_name(f"{layer}.weight"))
            for layer, path in layers.items()
        }
        self._norms = {parameter_name(f"{norm}.bias"): parameter_name(f"{norm}.shift") for norm in norms}
        made = self._shifts.keys() | self._biases.keys() | self._norms.keys()
        assert sources.keys() | made == shapes.keys(), "one source for every tensor of the state"
        found = {name: self._form(name, shapes[name]) for name in sources}
        self.forms = found | {name: TensorForm(torch.float32, shapes[name]) for name in sorted(made)}

    def read(self, name: str) -> Tensor:
        """Reads or makes a contiguous tensor on the CPU. Raises InputError as :meth:`Checkpoint.read`."""
        if name in self._shifts:
            return self._shifts[name]
        if name in self._norms:
            return self._stored(name).float() - self._shifts[self._norms[name]]
        if name in self._biases:
            shift, weight = self._biases[name]
            product = product_with_shift(self._stored(weight).float(), self._shifts[shift])
            return product + self._stored(name).float() if name in self._sources else product
        return self._stored(name)

    def _stored(self, name: str) -> Tensor:
        source = self._sources[name]
        return source.take(self._checkpoint.read(source.name))

    def _form(self, name: str, wanted: tuple[int, ...]) -> TensorForm:
        source = self._sources[name]
        stored = self._checkpoint.form(source.name)
        if source.shape(stored.shape) != wanted:
            raise InputError(
                f"{self._checkpoint.place}: {source.name} is {list(stored.shape)}, which does not fit config.json:"
                " the weights are of another model"
            )
        return TensorForm(stored.dtype, wanted)


@dataclass(frozen=True)
class Layout:
    """A model to stream, found from configurations alone.

    ``denoiser`` is on the meta device, transformed; ``sources`` say what each tensor of its state is. Where the time
    features depend on the prompt too, there is no ``time_table`` and the time path is in ``denoiser``. Its weights are
    the only ones that are read to make a table.
    """

    denoiser: IndexedDenoiser
    sources: dict[str, TensorSource]
    transforms: Transforms
    plan: PrecisionPlan
    time_table: TimeTable | None
    timesteps: TimestepTable
    tokens: int


def resolve_layout(base: BasePipeline, recipe: Recipe, given: PrecisionPlan | None) -> Layout:
    """Resolves a recipe over a pipeline; a ``given`` plan replaces the recipe's rules.

    Raises:
        InputError: the recipe or the plan does not fit the pipeline, or a part of the pipeline cannot be read.
    """
    config = base.denoiser_config()
    conditioned = bool(base.family.added_width(config))
    pipe = load_pipeline(base, without=component_classes(base.folder, torch.nn.Module))  # scheduler and tokenizers
    timesteps = timestep_table_of(
        pipe.scheduler,
        recipe.sampling.steps,
        fractional=conditioned,
        strength=recipe.sampling.strength or base.default_strength,
    )
    table = None if conditioned else _time_table(base, len(timesteps.angle))
    skeleton = indexed_skeleton(config, table or timesteps)
    denoiser = skeleton.denoiser
    transforms = split_shortcuts(denoiser, recipe)
    shapes = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    sources = split_sources(skeleton.sources, shapes, transforms.spec.split)
    transforms, _, plan = planned_layers(recipe, transforms, config, table or timesteps, given)
    transforms.apply(denoiser)
    sources = shifted_sources(sources, transforms.spec.shifted)
    tokens = text_tokens(pipe, recipe.sampling.max_sequence_length)
    return Layout(denoiser, sources, transforms, plan, table, timesteps, tokens)


@torch.no_grad()
def _time_table(base: BasePipeline, timesteps: int) -> TimeTable:
    path = load_time_path(base)
    return TimeTable(path(torch.arange(timesteps, dtype=torch.float32)).numpy(), path.slices)
