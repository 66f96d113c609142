"""The public functions: one per command, with arguments in the forms that people have.

Each turns its arguments into records and runs a stage. A command of ``s2p-deploy`` reads its options, calls the
function of its name, and prints. Import them from ``s2p_deploy``.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from s2p_deploy.context import Context
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from s2p_deploy.calib.dataset import Estimate
    from s2p_deploy.calib.target import SearchTime
    from s2p_deploy.calib.training_memory import Fit, TrainingTime
    from s2p_deploy.engines import BoundRunner, BuildOptions, Limits
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.families.lora import GivenLora
    from s2p_deploy.pipeline import EnginePipeline, Schedule
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import (
        BaseOptions,
        CalibratedModel,
        ComponentEngines,
        Engine,
        ExportedGraph,
        Manifest,
        PrecisionPlan,
        PromptSet,
        ScaleTable,
        ValidationReport,
    )
    from s2p_deploy.timesteps import Timesteps

_BUNDLED_PROMPTS = "shapes:"
BOUNDARY_RATIO = 0.1  # of joined engines: a tenth of the timesteps, which are 5 of 51 calls or 2 of 20


def calibrate(  # noqa: PLR0913 - the command's options
    model: str | Path | BasePipeline | DiffusionPipeline,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    options: BaseOptions | None = None,
    prompts: str | Path | Sequence[str] | PromptSet | None = None,
    plan: str | Path | PrecisionPlan | None = None,
    initial: str | Path | CalibratedModel | None = None,
    dataset: str | Path | None = None,
    weights_dir: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    force: bool = False,
    context: Context = Context(),
    on_estimate: Callable[[Estimate | Fit | TrainingTime | SearchTime], None] | None = None,
) -> CalibratedModel:
    """Trains weights and timestep-indexed scales of a pipeline from prompts alone.

    A run that was stopped continues where it was when it is started again with the same arguments; a finished ``out``
    of the same arguments is opened.

    Args:
        model: a folder in diffusers format, a single file, a hub id (``owner/name``), ``"shapes"`` (bundled), or a
            diffusers pipeline in memory. The latter is saved once, as safetensors in ``pipeline-<digest>`` beside
            ``out`` (or in the context's working folder), because artifacts name their pipeline by its digest.
        recipe: a recipe's name, a YAML file, its values (``extends`` may name another one), or a Recipe.
        out: folder of the artifact to write.
        options: how the model is read where its files leave it open.
        prompts: a prompt file, ``"shapes:train"`` (bundled), texts, or a PromptSet; recipes that look at no activation
            (``fp``, ``ptq-stream``) need none.
        plan: an edited ``plan.yaml`` that decides the formats in place of the recipe's rules.
        initial: a calibrated model to continue from; with ``scales.activations: given``, one to take scales from.
        dataset: folder of a latent dataset that other calibrations share; made there where there is none.
        weights_dir: folder of local weights, for a target of LPIPS.
        lora: files of LoRAs to fuse into the weights first, as ``FILE`` or ``FILE:WEIGHT``. The fused pipeline is
            written once, to ``pipeline-<digest>`` beside ``out`` (or in the context's working folder).
        force: replaces an artifact at ``out``, once the new one is complete.
        context: device, threads, progress.
        on_estimate: called with how the training fits into memory, its time, and the size and time of a dataset, before
            either begins.

    Raises:
        InputError: an argument is wrong, or ``out`` was made from other arguments.
        IntegrityError: an artifact was changed. MissingEnvironmentError: there is no such device, or the training does
            not fit into its memory.

    Example:
        >>> model = calibrate("shapes", recipe="ptq-stream", out="build/calib")
        >>> model.plan.layers[0].name
        'conv_in'
    """
    out = new_folder(out)
    resolved = as_recipe(recipe)
    texts = None if prompts is None else as_prompts(prompts)
    # PyTorch and diffusers take seconds to import: what is cheap to check was checked first
    from s2p_deploy.calib import calibrate as calibrate_base
    from s2p_deploy.metric_networks import open_weights
    from s2p_deploy.records import CalibratedModel
    from s2p_deploy.records.precision_plan import read_plan

    beside = context.work or out.parent
    return calibrate_base(
        with_loras(as_base(model, beside, options), lora, beside, context),
        resolved,
        texts,
        out,
        plan=read_plan(Path(plan)) if isinstance(plan, str | Path) else plan,
        initial=CalibratedModel.open(Path(initial)) if isinstance(initial, str | Path) else initial,
        dataset=None if dataset is None else Path(dataset),
        replace=force,
        on_estimate=on_estimate,
        weights=None if weights_dir is None else open_weights(Path(weights_dir)),
        context=context,
    )


def calibrate_controlnet(  # noqa: PLR0913 - the command's options
    model: str | Path | BasePipeline,
    *,
    controlnet: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    prompts: str | Path | Sequence[str] | PromptSet,
    pictures: str | Path | Sequence[Image],
    out: str | Path,
    force: bool = False,
    context: Context = Context(),
) -> CalibratedModel:
    """Calibrates a ControlNet, which is then exported and built as a denoiser is.

    Args:
        model: the floating-point pipeline that it acts in: its folder, a hub id, or ``shapes``.
        controlnet: its folder, in diffusers format.
        recipe: a recipe's name or file, or its values.
        prompts: a prompt file, or prompts; the first ``dataset.prompts`` are walked.
        pictures: what the ControlNet reads, or a folder of PNG, JPEG or WebP files of it: one for each prompt, in turn.
        out: folder of the artifact to write.
        force: replaces an artifact at ``out``, once the new one is complete.
        context: device, threads, progress.

    Raises:
        InputError: an argument is wrong, ``out`` exists, or the ControlNet does not fit. S2PError: training diverged.
    """
    from s2p_deploy.calib.controlnet import calibrate_controlnet as calibrate_pictures
    from s2p_deploy.pipeline.start_picture import read_pictures

    given = read_pictures(Path(pictures), "control picture") if isinstance(pictures, str | Path) else list(pictures)
    folder = new_folder(out)
    base, walked = as_base(model, folder), as_prompts(prompts)
    return calibrate_pictures(
        base, Path(controlnet), as_recipe(recipe), walked, given, folder, replace=force, context=context
    )


def adapt(
    calibrated: str | Path | CalibratedModel,
    *,
    lora: str | Path | Sequence[str | Path],
    out: str | Path,
    model: str | Path | BasePipeline | None = None,
    force: bool = False,
    context: Context = Context(),
) -> CalibratedModel:
    """Puts LoRAs into a calibrated model: keeps its plan and activation scales, and fits the touched weights again.

    Args:
        calibrated: a calibrated model or its folder.
        lora: files of LoRAs, as ``FILE`` or ``FILE:WEIGHT``. The fused pipeline is written once, to
            ``pipeline-<digest>`` beside ``out`` (or in the context's working folder).
        out: folder of the artifact to write.
        model: the floating-point pipeline, if it was moved since calibration.
        force: replaces an artifact at ``out``, once the new one is complete.
        context: threads and progress.

    Raises:
        InputError: a LoRA cannot be read or is of another model, or ``out`` exists.
        IntegrityError: an artifact or the pipeline was changed.

    Example:
        >>> adapted = adapt("build/calib", lora="ink.safetensors:0.8", out="build/calib-ink")
        >>> adapted.manifest.content["request"]["fused LoRAs"][0]["weight"]
        0.8
    """
    out = new_folder(out)
    from s2p_deploy.calib import adapt as adapt_model
    from s2p_deploy.records import CalibratedModel, check_vacant

    opened = CalibratedModel.open(Path(calibrated)) if isinstance(calibrated, str | Path) else calibrated
    check_vacant(out, "CalibratedModel", replace=force, inputs={"calibrated model": opened.folder})
    base = base_of(opened.manifest, model)
    fused = with_loras(base, lora, context.work or out.parent, context)
    return adapt_model(opened, base, fused, out, replace=force, context=context)


def export_graph(  # noqa: PLR0913 - the command's options
    calibrated: str | Path | CalibratedModel,
    *,
    out: str | Path,
    dtype: Literal["fp32", "fp16"] = "fp32",
    time_table: Literal["constant", "input"] | None = None,
    text_projections: Literal["graph", "input"] = "graph",
    sizes: Literal["fixed", "dynamic"] = "fixed",
    chunks: tuple[int, int] | None = None,
    lora_rank: int | None = None,
    lora_layers: Sequence[str] = (),
    lora_for: Sequence[str | Path] = (),
    controlnet: bool = False,
    image_tokens: int | None = None,
    image_adapters: int | None = None,
    model: str | Path | BasePipeline | None = None,
    force: bool = False,
    context: Context = Context(),
) -> ExportedGraph:
    """Writes a calibrated model as one QDQ ONNX graph whose activation scales are a timestep-indexed input.

    Args:
        calibrated: a calibrated model or its folder.
        out: folder of the artifact to write.
        dtype: floating-point type of the graph: ``fp32`` for CPU engines and parity, ``fp16`` for TensorRT.
        time_table: ``constant`` keeps the projected time features in the graph, which then runs schedules of integer
            timesteps; ``input`` makes them an input, for all schedules. None: ``constant`` where the model allows it.
        text_projections: ``graph`` computes keys and values of cross-attention in every step, ``input`` once per
            prompt beside the graph.
        sizes: ``fixed`` takes latents of the trained size, ``dynamic`` of any height and width.
        chunks: the fewest and most chunks of text that one engine takes, for long or weighted prompts (None: one).
        lora_rank: ranks of the low-rank branches through which an engine takes LoRAs at run time, as many as those that
            act at once have together (None: no branches, or with ``lora_for`` the largest rank of these files).
        lora_layers: kinds of layers that get a branch (none: attention).
        lora_for: LoRA files; exactly the layers that they change get a branch.
        controlnet: makes the residuals of ControlNets inputs; left out of a call, they are zeros.
        image_tokens: the most tokens of an image prompt that an engine takes from an IP-Adapter (None: it takes none).
        image_adapters: how many IP-Adapters may act at once (None: one).
        model: the floating-point pipeline, if it was moved since calibration.
        force: replaces an artifact at ``out``, once the new one is complete.
        context: progress.

    Raises:
        InputError: an argument is wrong, or ``out`` exists. IntegrityError: an artifact was changed.

    Example:
        >>> graph = export_graph("build/calib", out="build/graph")
        >>> [tensor.name for tensor in graph.inputs]
        ['sample', 'timestep_index', 'encoder_hidden_states', 'act_scales']
    """
    from s2p_deploy.export.exporter import export_graph as export_calibrated
    from s2p_deploy.export.lora_targets import lora_request
    from s2p_deploy.families import load_time_path
    from s2p_deploy.records import CalibratedModel

    if lora_layers and (lora_rank is None or lora_for):
        raise InputError("--lora-layers go with --lora-rank and without --lora-for, whose files name the layers")
    if image_adapters is not None and image_tokens is None:
        raise InputError("--image-adapters go with --image-tokens: say how many tokens an image prompt may have")
    opened = CalibratedModel.open(Path(calibrated)) if isinstance(calibrated, str | Path) else calibrated
    needs_path = time_table == "input" and not opened.added_width
    lora = None
    if lora_rank is not None or lora_for:
        base = base_of(opened.manifest, model) if lora_for else None
        lora = lora_request(lora_rank, tuple(lora_layers) or ("attention",), [Path(file) for file in lora_for], base)
    return export_calibrated(
        opened,
        new_folder(out),
        dtype=dtype,
        time_table=time_table,
        time_path=load_time_path(base_of(opened.manifest, model)) if needs_path else None,
        text_projections=text_projections,
        sizes=sizes,
        chunks=chunks,
        lora=lora,
        controlnet=controlnet,
        images=None if image_tokens is None else (image_tokens, 1 if image_adapters is None else image_adapters),
        replace=force,
        context=context,
    )


def build_engine(  # noqa: PLR0913 - the command's options
    graph: str | Path | ExportedGraph,
    *,
    backend: str,
    out: str | Path,
    options: BuildOptions | None = None,
    limits: Limits | None = None,
    force: bool = False,
    context: Context = Context(),
) -> Engine:
    """Builds a backend's engine from an exported graph, in a child process. A build that fails leaves nothing behind.

    Args:
        graph: an exported graph or its folder.
        backend: ``onnxruntime``, ``openvino``, ``tensorrt_rtx`` or ``tensorrt``.
        out: folder of the artifact to write.
        options: precision, batch sizes, picture sizes, lowering (None: the backend's defaults).
        limits: seconds and bytes of memory that the build may take.
        force: replaces an artifact at ``out``, once the new one is complete.
        context: progress, and the GPU for builders that need one.

    Raises:
        InputError: an argument is wrong, ``out`` exists, or the graph's type is not the backend's.
        MissingEnvironmentError: the backend's library, memory or disk is missing.
        EngineBuildError: the backend failed or crashed.

    Example:
        >>> engine = build_engine("build/graph", backend="onnxruntime", out="build/engine")
        >>> engine.backend
        'onnxruntime'
    """
    from s2p_deploy.engines.build import build_engine as build_graph
    from s2p_deploy.records import ExportedGraph

    return build_graph(
        ExportedGraph.open(Path(graph)) if isinstance(graph, str | Path) else graph,
        new_folder(out),
        backend=backend,
        options=options,
        replace=force,
        limits=limits,
        context=context,
    )


def join_engines(
    engine: str | Path | Engine,
    low_noise: str | Path | Engine,
    *,
    out: str | Path,
    boundary_ratio: float = BOUNDARY_RATIO,
    force: bool = False,
) -> Engine:
    """Joins an engine with a more precise one for the last timesteps, where rounding is seen in the picture.

    Args:
        engine: an engine or its folder; it runs the timesteps from the boundary on.
        low_noise: the engine that runs those below it, of the same export and build options.
        out: folder of the artifact to write, which holds copies of both.
        boundary_ratio: the boundary, as a share of the training timesteps.
        force: replaces an artifact at ``out``, once the new one is complete.

    Raises:
        InputError: the engines do not go together, or ``out`` exists. IntegrityError: a file was changed.

    Example:
        >>> joined = join_engines("build/engine", "build/fp-engine", out="build/joined")
        >>> joined.boundary
        100.0
    """
    from s2p_deploy.engines.joined import join_engines as join_opened

    opened = (as_engine(engine), as_engine(low_noise))
    return join_opened(*opened, new_folder(out), boundary_ratio=boundary_ratio, replace=force)


def validate(  # noqa: PLR0913 - the command's options
    engine: str | Path | Engine,
    *,
    prompts: str | Path | Sequence[str] | PromptSet,
    out: str | Path,
    pictures: int | None = None,
    schedules: Sequence[Schedule] = (),
    floor: str | Path | Engine | None = None,
    weights: str | Path | None = None,
    bench: Mapping[str, Any] | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    graph: str | Path | None = None,
    calib: str | Path | None = None,
    model: str | None = None,
    force: bool = False,
    command: str = "",
    context: Context = Context(),
) -> ValidationReport:
    """Compares an engine with its floating-point pipeline: numbers, pictures, a verdict, a page.

    A failed gate is a result and raises nothing: see ``report.verdict`` (``passed``, ``failed``, ``not verified``).
    A run that was stopped continues where it was when it is started again with the same arguments.

    Args:
        engine: an engine or its folder.
        prompts: held-out prompts: a prompt file, ``"shapes:held_out"`` (bundled), texts, or a PromptSet.
        out: folder of the report to write.
        pictures: number of prompts to draw (None: the recipe's).
        schedules: other schedules to draw on, reported and not gated.
        floor: an engine of recipe ``fp`` of the same pipeline, to report beside this one.
        weights: folder of weights for LPIPS, FID and CLIP scores, with ``SHA256SUMS``.
        bench: the object that ``s2p-deploy bench --json`` printed of this engine, for the report.
        lora: LoRA files, each perhaps with ``:weight`` behind it, which act in all pictures, the pipeline's and the
            engine's.
        graph: the engine's graph, if it was moved since the build.
        calib: the graph's calibrated model, if it was moved since the export.
        model: the floating-point pipeline, if it was moved since calibration.
        force: replaces a report at ``out``, once the new one is complete.
        command: a command line to name in the report.
        context: where the references compute (``auto``: on the engine's device), threads and progress.

    Raises:
        InputError: an argument is wrong, a parent is missing, or ``out`` exists.
        IntegrityError: an artifact was changed. MissingEnvironmentError: the engine cannot be loaded here.

    Example:
        >>> report = validate("build/engine", prompts="shapes:held_out", out="build/report", pictures=2)
        >>> report.verdict in {"passed", "failed", "not verified"}
        True
    """
    from s2p_deploy.validation import open_chain, open_weights
    from s2p_deploy.validation import validate as validate_chain

    chain = open_chain(
        as_engine(engine),
        graph=None if graph is None else Path(graph),
        calib=None if calib is None else Path(calib),
        model=model,
    )
    return validate_chain(
        chain,
        as_prompts(prompts),
        new_folder(out),
        pictures=pictures,
        schedules=tuple(schedules),
        floor=None if floor is None else as_engine(floor),
        weights=None if weights is None else open_weights(Path(weights)),
        bench=bench,
        loras=as_loras(lora),
        replace=force,
        command=command,
        context=context,
    )


def open_pipeline(
    engine: str | Path | Engine,
    *,
    model: str | Path | BasePipeline | None = None,
    schedules: Sequence[Schedule] = (),
    components: str | Path | ComponentEngines | None = None,
    public_key: str | Path | None = None,
    context: Context = Context(),
) -> EnginePipeline:
    """Opens a stock diffusers pipeline whose denoiser is an engine.

    Args:
        engine: an engine or its folder.
        model: the floating-point pipeline, if it was moved since calibration.
        schedules: the schedules that will be used, where their timesteps are fractional.
        components: text encoders and autoencoder on a backend, or their folder (None: PyTorch's).
        public_key: a PEM file; what was not signed with its private half is refused.
        context: device and dtype of PyTorch's networks.

    Returns:
        A context manager: ``.pipe`` is the diffusers pipeline; leaving it frees the engine.

    Raises:
        InputError: there is no such engine or pipeline, or the engine does not run one of ``schedules``.
        IntegrityError: a file was changed, or something is of another pipeline or not signed.
        MissingEnvironmentError: a library or device is missing.

    Example:
        >>> with open_pipeline("build/engine") as opened:
        ...     opened.pipe("a small red circle", num_inference_steps=2).images[0].size
        (64, 64)
    """
    from s2p_deploy.pipeline import open_pipeline as open_records

    opened = as_engine(engine, public_key)
    given = None if components is None else as_components(components, public_key)
    base = base_of(opened.manifest, model)
    return open_records(opened, base, schedules=schedules, components=given, context=context)


def load_engine(
    engine: str | Path | Engine,
    *,
    graph: str | Path | ExportedGraph | None = None,
    scales: ScaleTable | None = None,
    timesteps: Sequence[Timesteps] = (),
    public_key: str | Path | None = None,
    device: str = "auto",
) -> BoundRunner:
    """Loads an engine without a pipeline, for calls of the denoiser by itself.

    Args:
        engine: an engine or its folder.
        graph: an exported graph or its folder, which the engine must have been built from.
        scales: activation scales of the training timesteps in place of the engine's own.
        timesteps: those of every schedule that will be used, where they are fractional.
        public_key: a PEM file; an engine that was not signed with its private half is refused.
        device: ``cuda:1`` and the like: the GPU of an engine that runs on one (otherwise PyTorch's current one).

    Returns:
        A context manager with ``infer(inputs) -> outputs`` over NumPy arrays; leaving it frees the engine.

    Raises:
        InputError: ``scales`` or ``timesteps`` do not fit. IntegrityError: a file was changed or is not signed.
        MissingEnvironmentError: a library or device is missing.

    Example:
        >>> with load_engine("build/engine") as runner:
        ...     [tensor.name for tensor in runner.inputs]
        ['sample', 'timestep_index', 'encoder_hidden_states']
    """
    from s2p_deploy.engines import load_engine as load_opened
    from s2p_deploy.records import ExportedGraph

    expected = ExportedGraph.open(Path(graph)) if isinstance(graph, str | Path) else graph
    return load_opened(as_engine(engine, public_key), expected, scales, timesteps, device=device)


def new_folder(out: str | Path) -> Path:
    """Checks that a folder to write has a name of its own.

    Raises:
        InputError: it is empty, ``.``, ``..`` or a root.
    """
    folder = Path(out)
    if folder.name in {"", ".."}:
        raise InputError(f"--out {str(out)!r} is no folder to write an artifact to: give a new folder's name")
    return folder


def as_base(
    model: str | Path | BasePipeline | DiffusionPipeline, beside: Path, options: BaseOptions | None = None
) -> BasePipeline:
    """Finds a pipeline, or saves one that is in memory into the folder ``beside``; ``options`` are of one on disk.

    Raises:
        InputError: there is no such pipeline, or it is of a class that is not supported.
    """
    from s2p_deploy.families.pipelines import BasePipeline, resolve_base, save_pipeline
    from s2p_deploy.records import BaseOptions

    if isinstance(model, str | Path):
        return resolve_base(str(model), options or BaseOptions())
    if options is not None:
        raise InputError("options say how a model's files are read, and this one was read already: leave them away")
    return model if isinstance(model, BasePipeline) else save_pipeline(model, beside)


def with_loras(
    base: BasePipeline, lora: str | Path | Sequence[str | Path], beside: Path, context: Context = Context()
) -> BasePipeline:
    """Fuses LoRAs into a pipeline, which is written into the folder ``beside`` once; without any it stays as it is.

    Raises:
        InputError: a LoRA cannot be read, or is of another model. IntegrityError: what was written was changed.
    """
    if not lora:
        return base
    from s2p_deploy.calib.fused_pipeline import fuse_loras

    return fuse_loras(base, as_loras(lora), beside, context.progress)


def as_loras(lora: str | Path | Sequence[str | Path]) -> tuple[GivenLora, ...]:
    """Parses LoRA files, each perhaps with ``:weight`` behind it. Raises InputError for anything else."""
    from s2p_deploy.families.lora import GivenLora

    return tuple(GivenLora.parse(str(each)) for each in ([lora] if isinstance(lora, str | Path) else lora))


def base_of(manifest: Manifest, model: str | Path | BasePipeline | None = None) -> BasePipeline:
    """Finds the floating-point pipeline of an artifact: ``model``, or where it was at calibration.

    Raises:
        InputError: there is none. IntegrityError: it is another one, or was changed.
    """
    from s2p_deploy.families.pipelines import BasePipeline, check_base
    from s2p_deploy.families.pipelines import base_of as find_base

    if isinstance(model, BasePipeline):
        check_base(model, manifest)
        return model
    return find_base(manifest, None if model is None else str(model))


def as_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """Resolves a recipe by its name, its file or its values.

    Raises:
        InputError: there is no such recipe, or a key or value is wrong.
    """
    from s2p_deploy.recipe import Recipe, recipe_from_data

    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
        return Recipe.load(recipe)
    values = dict(recipe)
    parent = values.pop("extends", None)
    return recipe_from_data(values, "in memory") if parent is None else Recipe.load(parent, values)


def as_prompts(prompts: str | Path | Sequence[str] | PromptSet) -> PromptSet:
    """Reads a prompt file or a bundled one (``shapes:NAME``), or collects texts.

    Raises:
        InputError: there is no such file, it is no prompt file, or there is no text.
    """
    from s2p_deploy.records import PromptSet, read_prompts

    if isinstance(prompts, PromptSet):
        return prompts
    if not isinstance(prompts, str | Path):
        return PromptSet.of(prompts)
    if not str(prompts).startswith(_BUNDLED_PROMPTS):
        return read_prompts(Path(prompts))
    folder = Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline" / "prompts"))
    names = sorted(path.stem for path in folder.glob("*.jsonl"))
    name = str(prompts).removeprefix(_BUNDLED_PROMPTS)
    if name not in names:
        known = ", ".join(_BUNDLED_PROMPTS + known for known in names) or "none"
        raise InputError(f"there is no bundled prompt file {prompts!r}: there are {known}")
    return read_prompts(folder / f"{name}.jsonl")


def as_engine(engine: str | Path | Engine, public_key: str | Path | None = None) -> Engine:
    """Opens an engine; with ``public_key``, only one that was signed with its private half.

    Raises:
        InputError: there is no engine, or the key cannot be read. IntegrityError: it was changed or is not signed.
    """
    from s2p_deploy.records import Engine
    from s2p_deploy.signing import open_engine

    key = None if public_key is None else Path(public_key)
    if isinstance(engine, Engine):
        return engine if key is None else open_engine(engine.folder, key)
    return open_engine(Path(engine), key)


def as_components(components: str | Path | ComponentEngines, public_key: str | Path | None = None) -> ComponentEngines:
    """Opens text encoders and autoencoder on a backend; with ``public_key``, only if signed with its private half.

    Raises:
        InputError: there is no such artifact. IntegrityError: it was changed, or is not signed with that key.
    """
    from s2p_deploy.errors import IntegrityError
    from s2p_deploy.records import ComponentEngines
    from s2p_deploy.signing import check_signature

    folder = components.folder if isinstance(components, ComponentEngines) else Path(components)
    signed = None if public_key is None else check_signature(folder, Path(public_key))
    opened = ComponentEngines.open(folder)
    if signed is not None and opened.manifest != signed:
        raise IntegrityError(f"{folder} was changed while it was opened")
    return opened
