"""The stage: a pipeline, a recipe and prompts give a CalibratedModel; killed at any time, a second start continues."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from dataclasses import asdict
from dataclasses import replace as replaced
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from s2p_deploy.calib.dataset import DatasetRequest, generate_dataset, open_dataset
from s2p_deploy.calib.hooks import PRODUCT, Hooks
from s2p_deploy.calib.memory import memory_of, samples_that_fit, usable_memory
from s2p_deploy.calib.model_files import WEIGHTS, training_summary, write_model_files
from s2p_deploy.calib.modelopt import modelopt_scales, set_smoothing, smoothed_layers
from s2p_deploy.calib.picture_error import KINDS, sharing_tensors
from s2p_deploy.calib.pictures import check_pictures
from s2p_deploy.calib.plan import Transforms, mixed_plan, planned_layers
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
from s2p_deploy.calib.request import (
    KIND,
    CalibrationRequest,
    check_out,
    claim_unfinished,
    continued,
    is_unfinished,
    open_calibrated,
)
from s2p_deploy.calib.samples import calibrated_indices
from s2p_deploy.calib.sensitivity import layer_sensitivities
from s2p_deploy.calib.shifts import input_ranges, middle
from s2p_deploy.calib.streaming import resolve_layout, stream_model, streams
from s2p_deploy.calib.target import (
    SearchTime,
    lpips_file,
    rank_by_picture,
    reach_target,
    search_time,
    shares_of_products,
    target_prompts,
    with_errors,
)
from s2p_deploy.calib.training import LOG, TrainingSetting, held_out_trajectories, train
from s2p_deploy.calib.training_memory import Division, Fit, Network, TrainingAccount, TrainingTime, fit_training
from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.calib.trajectories import call_with_zeros, in_parts, load_float_pipeline, seconds_of_call
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    ShiftedLayer,
    apply_transforms,
    load_scheduler,
    module_of_type,
    set_norm_shift,
    shifts_by_layer,
    text_tokens,
)
from s2p_deploy.recipe import Override, Recipe
from s2p_deploy.records import CalibratedModel, PromptSet, ScaleTable, TransformSpec, write_artifact
from s2p_deploy.records.files import claimed, link_or_copy, link_or_copy_files, write_tensors
from s2p_deploy.records.precision_plan import read_plan, write_plan
from s2p_deploy.timesteps import (
    interpolate_scales,
    scales_for_schedule,
    timestep_indices,
    timestep_table_of,
    with_schedules,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.calib.dataset import Estimate
    from s2p_deploy.calib.trajectories import FloatPipeline
    from s2p_deploy.families import BasePipeline, IndexedDenoiser, QuantizableLayer
    from s2p_deploy.metric_networks import MetricWeights
    from s2p_deploy.records import LatentDataset, PrecisionPlan

_LOGGER = logging.getLogger(__name__)

_DATASET = "dataset"
_NO_PROMPTS = PromptSet(())
_PLAN, _SHIFTS, _STARTING_SCALES = "plan.yaml", "shifts.safetensors", "starting_scales.safetensors"
_WEIGHTS, _ACT_SCALES = "weights/", "act_scales"


def calibrate(  # noqa: PLR0913 - what is calibrated, from what, to where, and options by keyword
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet | None,
    out: Path,
    *,
    plan: PrecisionPlan | None = None,
    initial: CalibratedModel | None = None,
    dataset: Path | None = None,
    replace: bool = False,
    on_estimate: Callable[[Estimate | Fit | TrainingTime | SearchTime], None] | None = None,
    weights: MetricWeights | None = None,
    hooks: Hooks = PRODUCT,
    context: Context = Context(),
) -> CalibratedModel:
    """Calibrates ``base`` and writes the CalibratedModel at ``out``, its LatentDataset in ``out/dataset``.

    Unfinished work is in ``<out>.partial``: a second start with the same request continues it, and a finished ``out``
    of the same request is returned as it is. Where the recipe leaves the guidance scale open, the pipeline's default is
    taken, and stored. A recipe that measures no activation (``fp``, ``ptq-stream``) is streamed: it reads one weight at
    a time, walks no prompt and leaves nothing behind where it is stopped.

    Args:
        base: the floating-point pipeline.
        recipe: what to do.
        prompts: the first are walked for the dataset, those after them select the checkpoint; a streamed recipe reads
            none.
        out: folder of the artifact.
        plan: replaces the plan that the recipe gives.
        initial: a finished model of the same pipeline to continue, with its plan and its transforms; such as for a
            short training on another schedule. With ``scales.activations: given`` a model, of another pipeline too,
            whose activation scales are taken.
        dataset: the LatentDataset of this pipeline, these prompts and the recipe's sections, made there where there is
            none; recipes that agree in :func:`dataset_name` can share it. None: made for this calibration alone.
        replace: drops an artifact and unfinished work of another request.
        on_estimate: called with how the training is divided to fit into memory, what time it will take, and with the
            size and time of a dataset that has to be made, before either begins.
        weights: local weights of the metrics of a target that need some (LPIPS).
        hooks: parts of other methods, for comparisons.
        context: where dataset and training are computed, and whom to report to.

    Raises:
        InputError: the recipe, the plan or the prompts do not fit, or ``out`` or its partial is of another request or
            at work in another process.
        MissingEnvironmentError: the training does not fit into the device's memory.
        S2PError: training diverged.
        IntegrityError: a finished artifact was changed.
    """
    context.set_threads()
    resolved = recipe.with_sampling(base.default_guidance, base.default_strength).with_target_gates()
    if context.seed is not None:
        resolved = resolved.with_seed(context.seed)
    _check_pipeline(base, resolved)
    streamed = streams(resolved, plan)
    if initial is not None and not streamed:
        _check_initial(initial, base, plan)
    if streamed and resolved.target.limits:
        raise InputError(f"recipe {recipe.name} draws no pictures, so it has no target: remove target, or take another")
    if resolved.target.lpips is not None:
        lpips_file(weights)
    nothing = (_NO_PROMPTS, _NO_PROMPTS, _NO_PROMPTS)
    walked, selection, judged = nothing if streamed else _prompts(resolved, prompts)
    request = CalibrationRequest(
        base, resolved, walked, selection, judged, out, plan, initial, dataset, replace, hooks, context, weights
    )
    check_out(request)
    with claimed(request.partial), context.arithmetic():
        if out.exists() and not replace:
            return open_calibrated(request)
        if streamed:
            stream_model(request)
        else:
            _calibrate_from_dataset(request, on_estimate)
    return CalibratedModel.open(out)


def training_fit(
    base: BasePipeline, recipe: Recipe, *, plan: PrecisionPlan | None = None, context: Context = Context()
) -> Fit | None:
    """Chooses how a recipe's training is divided so that it fits into the memory of the context's device.

    None where no memory is counted and none is given, or where no activation is looked at. The networks are not loaded,
    but recipe and plan are resolved over their layers either way.

    Raises:
        InputError: the recipe or the plan does not fit the pipeline.
        MissingEnvironmentError: the training does not fit, or without one a single sample.
    """
    layout = resolve_layout(base, recipe, plan)
    memory = None if streams(recipe, plan) else usable_memory(context.torch_device, context.memory_limit)
    if memory is None:
        return None
    network = Network(layout.denoiser, layout.plan, layout.tokens, teacher=_looks_at_a_teacher(recipe, PRODUCT))
    return fit_training(TrainingAccount(network, recipe.training), memory)


def dataset_name(recipe: Recipe) -> str:
    """Makes a short name that recipes share whose datasets are the same for one pipeline and one prompt file."""
    sections = {"sampling": recipe.sampling.model_dump(), "dataset": recipe.dataset.model_dump()}
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]


def _check_pipeline(base: BasePipeline, recipe: Recipe) -> None:
    """Raises InputError where an engine cannot compute the network or follow the scheduler; reads no weight."""
    config, family = base.denoiser_config(), base.family
    family.check(config)
    if recipe.scales.measured:
        check_pictures(base.pipeline_class, recipe)
    fractional, strength = bool(family.added_width(config)), recipe.sampling.strength or base.default_strength
    timestep_table_of(load_scheduler(base), recipe.sampling.steps, fractional=fractional, strength=strength)


def _check_initial(initial: CalibratedModel, base: BasePipeline, plan: PrecisionPlan | None) -> None:
    if initial.manifest.base.digest != base.base.digest:
        raise InputError(f"{initial.folder} was made from another pipeline than {base.base.source}: calibrate anew")
    initial.require_deployable()
    if plan is not None:
        raise InputError(f"cannot continue {initial.folder}: a plan was given too")


def _prompts(recipe: Recipe, prompts: PromptSet | None) -> tuple[PromptSet, PromptSet, PromptSet]:
    """Divides prompts into those that are walked, that select the checkpoint, and whose pictures are looked at."""
    if prompts is None:
        raise InputError(f"recipe {recipe.name} walks prompts: pass --prompts FILE")
    first, count = recipe.dataset.prompts, recipe.training.selection.prompts
    if count and len(prompts.prompts) < first + count:
        raise InputError(
            f"recipe {recipe.name} walks {first} prompts and selects by {count} others, of {len(prompts.prompts)}:"
            " give more prompts, or lower dataset.prompts or training.selection.prompts"
        )
    return prompts.first(first), PromptSet(prompts.prompts[first : first + count]), target_prompts(recipe, prompts)


def _check_effects(recipe: Recipe) -> None:
    """Raises InputError where a setting of a recipe would have no effect beside another one."""
    scales, mixed = recipe.scales, recipe.mixed
    if recipe.transforms.shift != "none" and scales.calibrator != "own":
        raise InputError(
            f"recipe {recipe.name} has transforms.shift, which {scales.calibrator} does not know: set it to none, or"
            " scales.calibrator to own"
        )
    overrides = {"sensitive": mixed.sensitive, "insensitive": mixed.insensitive}
    given = [f"mixed.{name}" for name, override in overrides.items() if override != Override()]
    given += ["mixed.products"] if mixed.products is not None else []
    if given and mixed.sensitivity == "none":
        raise InputError(
            f"recipe {recipe.name} has {' and '.join(given)}, and no ranking of the layers: set mixed.sensitivity, to"
            " pictures or fisher"
        )
    if mixed.products is not None and mixed.sensitive == Override():
        raise InputError(
            f"recipe {recipe.name} has mixed.products, and no format for the layers that it selects: set"
            " mixed.sensitive.activations=none, or mixed.sensitive.weights"
        )


def _calibrate_from_dataset(
    request: CalibrationRequest, on_estimate: Callable[[Estimate | Fit | TrainingTime | SearchTime], None] | None
) -> None:
    _check_effects(request.recipe)
    # Everything that can be refused is, before the work folder is claimed and before the long walk.
    request, fit = _fitted(request)
    if fit is not None and on_estimate is not None:
        on_estimate(fit)
    recipe, hooks = request.recipe, request.hooks
    of_dataset = DatasetRequest(
        request.base,
        request.prompts,
        recipe,
        request.dataset or request.partial / _DATASET,
        stored_calls=hooks.stored_calls,
    )
    dataset = open_dataset(of_dataset) if request.dataset is not None else None
    device = request.context.torch_device
    sampling = recipe.sampling
    source = load_float_pipeline(request.base, sampling.steps, hooks.time_table, device, strength=sampling.strength)
    transforms = hooks.transforms(source.denoiser, recipe)
    config = source.denoiser.config
    transforms, layers, plan = planned_layers(recipe, transforms, config, source.time_source, request.plan)
    request = _measured(request, source, 0 if fit is None else fit.resting)
    context = request.context
    claim_unfinished(request.partial, request.conditions(), replace=request.replace)
    if on_estimate is not None and recipe.training.iterations:
        on_estimate(_training_time(request, source))
    if on_estimate is not None and recipe.target.limits:
        on_estimate(search_time(request, source, plan))
    if dataset is None:
        dataset = generate_dataset(of_dataset, source, on_estimate=on_estimate, context=context)
    teacher = _teacher(request, source)
    state, transforms = starting_state(request, source, transforms, layers, plan, dataset)
    if teacher is not None:
        transforms.apply(teacher)  # exact while not fitted: the trained denoiser's module paths, the pipeline's outputs
    ranking = None
    if recipe.target.limits:  # with the pipeline's own weights, so before they are trained
        ranking = rank_by_picture(request, source, state, recipe.target.ranked)
        state.denoiser.plan = with_errors(state.denoiser.plan, ranking)
    setting = training_setting(request, source, teacher, state, dataset)
    outcome = train(state, dataset, setting, request.partial, context.progress)
    about: dict[str, Any] = {"training": training_summary(request, state.calibrated.tolist(), outcome)}
    if ranking is not None:
        state, reached = reach_target(request, source, state, ranking)
        about["target"] = asdict(reached) | {"text": str(reached)}
    write_model(request, source, state, transforms, dataset, about)
    shutil.rmtree(request.partial)


def _fitted(request: CalibrationRequest) -> tuple[CalibrationRequest, Fit | None]:
    """Divides the samples of an update so that training fits into memory; as before, where a run is continued.

    What the hooks of another method take is not counted, and nothing is changed for it.

    Raises:
        InputError: unfinished work of another request is in the way.
        MissingEnvironmentError: the training does not fit.
    """
    before = continued(request)
    if is_unfinished(request.partial, before.conditions(), replace=request.replace):
        return before, None
    if request.hooks != PRODUCT or usable_memory(request.context.torch_device, request.context.memory_limit) is None:
        return request, None
    fit = training_fit(request.base, request.recipe, plan=request.plan, context=request.context)
    if fit is None:
        return request, None
    chosen = fit.division
    recipe = request.recipe.with_division(chosen.batch, chosen.accumulate, checkpointing=chosen.checkpointing)
    return replaced(request, recipe=recipe), fit


def _measured(request: CalibrationRequest, source: FloatPipeline, beside: int) -> CalibrationRequest:
    """Measures how many samples a call takes on a GPU, beside a training that keeps so many bytes; unless it is known.

    Raises:
        MissingEnvironmentError: there is no room for one.
    """
    memory = memory_of(source.device)
    if memory is None or request.context.samples_per_call is not None:
        return request
    tokens = text_tokens(source.pipe, request.recipe.sampling.max_sequence_length)
    found = samples_that_fit(lambda samples: call_with_zeros(source.denoiser, tokens, samples), memory, beside=beside)
    return replaced(request, context=replaced(request.context, samples_per_call=found))


def _training_time(request: CalibrationRequest, source: FloatPipeline) -> TrainingTime:
    """Estimates the time of the training from one forward pass on the device."""
    training, per_call = request.recipe.training, request.context.samples_per_call
    tokens = text_tokens(source.pipe, request.recipe.sampling.max_sequence_length)
    samples = min(training.batch, per_call or training.batch)
    seconds = seconds_of_call(source.denoiser, tokens, samples) * training.batch * training.accumulate / samples
    return TrainingTime(Division.of(training), training.iterations, seconds)


def _looks_at_a_teacher(recipe: Recipe, hooks: Hooks) -> bool:
    training = recipe.training
    return training.features.targets != "none" or training.selection.prompts > 0 or hooks.needs_teacher


def _teacher(request: CalibrationRequest, source: FloatPipeline) -> IndexedDenoiser | None:
    """Copies the floating-point denoiser before it is changed, where training looks at one."""
    if not _looks_at_a_teacher(request.recipe, request.hooks):
        return None
    return copy.deepcopy(source.denoiser).requires_grad_(requires_grad=False)


def starting_state(
    request: CalibrationRequest,
    source: FloatPipeline,
    transforms: Transforms,
    layers: tuple[QuantizableLayer, ...],
    plan: PrecisionPlan,
    dataset: LatentDataset,
) -> tuple[TrainingState, Transforms]:
    """Transforms ``source.denoiser`` in place and quantizes it; returns its state and all its transforms.

    Raises:
        InputError: the recipe does not fit the denoiser.
        InputError: an activation is not finite.
    """
    denoiser, recipe, progress = source.denoiser, request.recipe, request.context.progress
    per_call = request.context.samples_per_call
    calibrated = calibrated_indices(dataset)
    if source.deployed_time_table is not None:
        denoiser.set_time_table(source.deployed_time_table)
    calibrator = recipe.scales.calibrator
    if request.initial is not None:
        transforms, plan = Transforms(request.initial.transforms), request.initial.plan
        weight_scales, act_scales = _continued(request.initial, source, calibrated)
    else:
        transforms.apply(denoiser)
        transforms.fit(denoiser, dataset, progress)
        _fit_shifts(request, denoiser, transforms.spec, dataset)
        peaks = (
            None if calibrator == "own" else modelopt_scales(denoiser, plan, dataset, calibrator, progress, per_call)
        )
        if peaks is not None and peaks.smoothing:
            if request.plan is not None:
                raise InputError("scales.calibrator: modelopt_smoothquant rewrites layers: give no plan file")
            smoothing = TransformSpec(smoothed=smoothed_layers(plan))
            apply_transforms(denoiser, smoothing)
            set_smoothing(denoiser, peaks.smoothing)
            transforms = replaced(transforms, spec=replaced(transforms.spec, smoothed=smoothing.smoothed))
            transforms, layers, plan = planned_layers(recipe, transforms, denoiser.config, source.time_source, None)
        plan = _final_plan(request, source, layers, plan, dataset, transforms.spec)
        if peaks is not None:
            weight_scales, act_scales = peaks.weight_scales(plan), peaks.act_scales(plan, len(calibrated))
        else:
            weight_scales, act_scales = _starting_scales(request, source, plan, dataset)
    quantized = QuantizedDenoiser(
        denoiser,
        plan,
        weight_scales,
        weight_format=request.hooks.weight_format,
        input_quantizer=request.hooks.input_quantizer,
    )
    quantized.follow_shifts(shifts_by_layer(denoiser, transforms.spec), settled=request.initial is not None)
    scales = request.hooks.act_scales(recipe, plan, act_scales)
    state = TrainingState(quantized, scales, torch.tensor(calibrated), per_call)
    state.modules().to(source.device)  # the scales, which come from files
    return state, transforms


def _fit_shifts(
    request: CalibrationRequest, denoiser: IndexedDenoiser, spec: TransformSpec, dataset: LatentDataset
) -> None:
    """Finds the shifts once and keeps them in the work folder."""
    file = request.partial / _SHIFTS
    if not spec.shifts:
        return
    if not file.exists():
        latents, context = request.recipe.scales.latents, request.context
        reading = {path: path for path in spec.shifted}
        reading |= {norm: first for norm, (first, *_) in spec.shifted_norms.items()}
        modules = tuple(reading.values())
        ranges = input_ranges(denoiser, modules, dataset, latents, context.progress, context.samples_per_call)
        write_tensors(file, {path: middle(*ranges[module]) for path, module in reading.items()})
    for path, shift in load_file(file).items():
        if path in spec.shifted_norms:
            set_norm_shift(denoiser, path, spec.shifted_norms[path], shift.to(denoiser.device))
        else:
            module_of_type(denoiser, path, ShiftedLayer).set_shift(shift.to(denoiser.device))


def _continued(
    initial: CalibratedModel, source: FloatPipeline, calibrated: tuple[int, ...]
) -> tuple[dict[str, Tensor], Tensor]:
    """Takes everything over from a finished calibration; timesteps new to it start at their interpolated scales."""
    denoiser = source.denoiser
    apply_transforms(denoiser, initial.transforms)
    denoiser.load_state_dict({name: torch.from_numpy(value) for name, value in initial.weights().items()})
    weight_scales = {name: torch.from_numpy(value) for name, value in initial.weight_scales().items()}
    timesteps = source.timesteps.timesteps[list(calibrated)]
    bound = with_schedules(initial.timesteps, [timesteps], covered=False)
    scales = scales_for_schedule(initial.scales, initial.timesteps, bound).scales
    return weight_scales, torch.from_numpy(scales[timestep_indices(timesteps, bound, covered=False)])


def _final_plan(
    request: CalibrationRequest,
    source: FloatPipeline,
    layers: tuple[QuantizableLayer, ...],
    plan: PrecisionPlan,
    dataset: LatentDataset,
    spec: TransformSpec,
) -> PrecisionPlan:
    """Adds mixed precision to the plan, unless the plan was given; found once and kept in the work folder."""
    recipe, file = request.recipe, request.partial / _PLAN
    if request.plan is not None:
        return request.plan
    if not file.exists() and recipe.mixed.sensitivity != "none":
        if recipe.mixed.sensitivity == "pictures":
            scores = _errors_of_layers(request, source, plan, dataset, spec)
        else:
            scores = layer_sensitivities(
                source.denoiser,
                plan,
                source.timesteps,
                dataset,
                recipe.mixed,
                seed=recipe.training.seed,
                progress=request.context.progress,
                samples_per_call=request.context.samples_per_call,
            )
        products = None
        if recipe.mixed.products is not None:
            tokens = text_tokens(source.pipe, recipe.sampling.max_sequence_length)
            products = shares_of_products(source.denoiser, plan, tokens)
        plan = mixed_plan(plan, layers, scores, recipe.mixed, products)
    if not file.exists():
        write_plan(request.hooks.refined_plan(request, source.denoiser, plan, dataset), file)
    return read_plan(file)


def _errors_of_layers(
    request: CalibrationRequest,
    source: FloatPipeline,
    plan: PrecisionPlan,
    dataset: LatentDataset,
    spec: TransformSpec,
) -> dict[str, float]:
    """Measures what of a layer mixed precision changes does to the pictures, with starting scales."""
    weight_scales, act_scales = request.hooks.starting_scales(request, source, plan, dataset)
    denoiser = QuantizedDenoiser(sharing_tensors(source.denoiser), plan, weight_scales)
    denoiser.follow_shifts(shifts_by_layer(denoiser.inner, spec), settled=False)
    calibrated = torch.tensor(calibrated_indices(dataset))
    scales = request.hooks.act_scales(request.recipe, plan, act_scales)
    state = TrainingState(denoiser, scales, calibrated, request.context.samples_per_call)
    state.modules().to(source.device)
    mixed = request.recipe.mixed
    changes = [*mixed.sensitive, *mixed.insensitive]
    kinds = {kind for kind, changed in changes if changed is not None} or KINDS
    return rank_by_picture(request, source, state, mixed.prompts, "mixed", kinds).of_layers(plan)


def _starting_scales(
    request: CalibrationRequest, source: FloatPipeline, plan: PrecisionPlan, dataset: LatentDataset
) -> tuple[dict[str, Tensor], Tensor]:
    """Finds the starting scales once and keeps them in the work folder."""
    file = request.partial / _STARTING_SCALES
    if not file.exists():
        weight_scales, act_scales = request.hooks.starting_scales(request, source, plan, dataset)
        write_tensors(
            file, {_WEIGHTS + name: scale for name, scale in weight_scales.items()} | {_ACT_SCALES: act_scales}
        )
    stored = load_file(file)
    act_scales = stored.pop(_ACT_SCALES)
    return {name.removeprefix(_WEIGHTS): scale for name, scale in stored.items()}, act_scales


def training_setting(
    request: CalibrationRequest,
    source: FloatPipeline,
    teacher: IndexedDenoiser | None,
    state: TrainingState,
    dataset: LatentDataset,
) -> TrainingSetting:
    """Collects what the recipe's training needs beside its state, which is as it starts."""
    recipe, hooks = request.recipe, request.hooks
    held_out = None
    if recipe.training.selection.prompts:
        assert teacher is not None, "selection has one"
        in_calls = in_parts(teacher, request.context.samples_per_call)
        held_out = held_out_trajectories(source, in_calls, request.selection, recipe)
    return TrainingSetting(
        training=recipe.training,
        loss=hooks.loss(request, source, teacher, state, dataset),
        order=hooks.batch_order(dataset, state.calibrated, recipe.training),
        teacher=teacher,
        held_out=held_out,
        learning_rate=hooks.learning_rate,
    )


def _warn_of_ends(schedule: tuple[float, ...], covered: tuple[float, float]) -> None:
    """Says so where the samples' timesteps do not reach to those of the schedule, ascending."""
    first, last = covered
    missing = [value for value in (schedule[0], schedule[-1]) if not first <= value <= last]
    if missing:
        _LOGGER.warning(
            "the dataset has no sample near timestep %g, so engines of this calibration cannot draw their own schedule:"
            " raise dataset.prompts (and give as many), or dataset.samples_per_prompt",
            missing[0],
        )


def write_model(
    request: CalibrationRequest,
    source: FloatPipeline,
    state: TrainingState,
    transforms: Transforms,
    dataset: LatentDataset,
    about: dict[str, Any],
) -> None:
    """Writes the model; ``about`` is what its manifest says of training and target."""
    calibrated = state.calibrated.tolist()
    timesteps = replaced(source.timesteps, calibrated=tuple(source.timesteps.timesteps[calibrated].tolist()))
    _warn_of_ends(source.timesteps.calibrated, timesteps.covered)
    scales = interpolate_scales(state.act_scales.table().cpu().numpy(), timesteps)

    def fill(folder: Path) -> dict[str, Any]:
        link_or_copy(request.partial / LOG, folder / LOG)
        link_or_copy_files(dataset.folder, folder / _DATASET)
        write_tensors(folder / WEIGHTS, request.hooks.stored_weights(folder, state, timesteps))
        content = write_model_files(
            folder,
            request,
            state.denoiser,
            weight_scales=state.denoiser.weight_scales(),
            act_scales=ScaleTable(scales, state.denoiser.plan.quantizer_names(), tuple(calibrated)),
            timesteps=timesteps,
            time_table=source.deployed_time_table,
            transforms=transforms.spec,
            tokens=text_tokens(source.pipe, request.recipe.sampling.max_sequence_length),
        )
        return content | about | {"dataset": dataset.manifest.digest}

    write_artifact(
        request.out,
        kind=KIND,
        base=request.base.base,
        recipe=request.recipe.model_dump(mode="json"),
        fill=fill,
        parents={_DATASET: (request.out / _DATASET, dataset.manifest)},
        replace=request.replace,
    )
