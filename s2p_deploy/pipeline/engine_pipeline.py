"""Stock diffusers pipelines with an engine as their denoiser: opened from an engine, saved to a folder, and loaded."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from s2p_deploy.context import Context
from s2p_deploy.engines import bound_timesteps, load_engine
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import (
    base_of,
    check_base,
    denoiser_of,
    latent_shape_of,
    load_pipeline,
    with_components,
    with_denoiser,
)
from s2p_deploy.families.network_files import read_index
from s2p_deploy.families.pipelines import PIPELINES, check_no_code, denoiser_name, load_folder
from s2p_deploy.pipeline.components import (
    AuxiliaryComponent,
    EngineDenoiser,
    auxiliary_components,
    denoiser_from_engine,
)
from s2p_deploy.pipeline.engine_component import EngineComponent
from s2p_deploy.pipeline.generation import timesteps_of
from s2p_deploy.records import Engine, check_vacant, open_artifact, parent_folder, write_artifact
from s2p_deploy.records.artifacts import copy_artifact
from s2p_deploy.records.engine import ComponentEngines
from s2p_deploy.records.exported_graph import CONTROL_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    import numpy as np
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.engines import BoundRunner
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.pipeline.generation import Schedule
    from s2p_deploy.records import Manifest

KIND = "Pipeline"
_ENGINE, _COMPONENTS = "engine", "components"
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}  # the last is diffusers' name for its safety checker's


@dataclass(frozen=True)
class EnginePipeline:
    """A stock pipeline with an engine in it, and the engine's runner. A context manager: leaving it closes both.

    Example:
        >>> opened = open_pipeline("build/engine")
        >>> [image.size for image in opened.pipe(["a small red circle"] * 2, num_inference_steps=2).images]
        [(64, 64), (64, 64)]
        >>> opened.close()
    """

    pipe: DiffusionPipeline
    runner: BoundRunner

    def close(self) -> None:
        """Frees the memory of the engine, and of text encoders and autoencoder that are engines too."""
        for component in self.pipe.components.values():
            if isinstance(component, EngineComponent):
                component.close()
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_pipeline(
    engine: Engine,
    base: BasePipeline | None = None,
    *,
    schedules: Sequence[Schedule] = (),
    components: ComponentEngines | None = None,
    runner: BoundRunner | None = None,
    context: Context = Context(),
) -> EnginePipeline:
    """Opens the stock diffusers pipeline of an engine. Networks that engines replace are not read.

    Args:
        engine: replaces the denoiser.
        base: the floating-point pipeline that it was made from (None: where it was then).
        schedules: every schedule that will be run; those with fractional timesteps must be named here.
        components: engines of text encoders and autoencoder (None: PyTorch's networks).
        runner: the engine, if it is loaded already, for all of ``schedules``.
        context: device and dtype of PyTorch's networks; an engine for a GPU runs on the device's.

    Raises:
        InputError: there is no such pipeline, or the engine does not run one of ``schedules``.
        IntegrityError: a file was changed, or ``base`` or ``components`` is of another pipeline.
        MissingEnvironmentError: a library or device is missing.
    """
    if base is None:
        base = base_of(engine.manifest)
    check_base(base, engine.manifest)
    if CONTROL_FILE in engine.manifest.files:
        raise InputError(f"{engine.folder} is an engine of a ControlNet: give it beside the denoiser's (--controlnet)")
    timesteps = schedules_to_bind(engine, base, schedules)  # what is refused is, before networks are read
    with ExitStack() as opened:  # what cannot be opened leaves nothing open
        loaded = _load_components(engine, components, context.device, opened)
        stock = load_pipeline(base, context.torch_dtype, without={base.family.component, *loaded})
        if runner is None:
            runner = opened.enter_context(load_engine(engine, schedules=timesteps, device=context.device))
        pipeline = _with_engine(stock, engine, runner, loaded, context)
        opened.pop_all()
    return pipeline


def schedules_to_bind(engine: Engine, base: BasePipeline, schedules: Sequence[Schedule]) -> list[NDArray[np.float64]]:
    """Lists the timesteps of each schedule that an engine is to run; of the pipeline only the scheduler is read.

    Raises:
        InputError: as :func:`timesteps_of`, or the engine does not run one of them.
    """
    timesteps = [timesteps_of(base, schedule) for schedule in schedules]
    bound_timesteps(engine, timesteps)
    return timesteps


def pipeline_with_engine(base: DiffusionPipeline, engine: Engine, runner: BoundRunner) -> DiffusionPipeline:
    """Makes a pipeline like ``base``, on its device, with a loaded engine as its denoiser; ``base`` stays as it is.

    Schedules with fractional timesteps must have been named when the engine was loaded::

        timesteps = timesteps_of(base, Schedule(20, "euler-karras"))
        pipe = pipeline_with_engine(base, engine, load_engine(engine, schedules=[timesteps]))
    """
    return with_denoiser(base, denoiser_from_engine(engine, runner).place(base.device, base.dtype))


def save_engine_pipeline(pipe: DiffusionPipeline, folder: str | Path, *, replace: bool = False) -> Manifest:
    """Saves a pipeline with an engine: stock components as diffusers saves them, engines copied as they are.

    Args:
        pipe: the pipeline of :func:`open_pipeline`, or any stock one with its denoiser.
        folder: where it is saved.
        replace: replaces a pipeline at ``folder``, once the new one is complete.

    Raises:
        InputError: ``folder`` exists, its disk has no room, or the denoiser is not that of an engine on disk.
        IntegrityError: an engine was changed since it was opened.

    Example:
        >>> with open_pipeline("build/engine") as opened:
        ...     save_engine_pipeline(opened.pipe, "build/pipeline").kind
        'Pipeline'
    """
    folder = Path(folder)
    denoiser = denoiser_of(pipe)
    if not isinstance(denoiser, EngineDenoiser):
        raise InputError("this pipeline's denoiser is no engine: save it with save_pretrained")
    engine = denoiser.saved_engine()
    auxiliary = {name: part for name, part in pipe.components.items() if isinstance(part, AuxiliaryComponent)}
    artifacts: dict[str, Engine | ComponentEngines] = {_ENGINE: engine}
    if auxiliary:
        first, *others = (part.engines for part in auxiliary.values())
        if any(other.manifest != first.manifest for other in others):
            raise InputError("its text encoders and autoencoder are of several artifacts: use pipe.save_pretrained")
        artifacts[_COMPONENTS] = first
    check_vacant(folder, KIND, replace=True, inputs={name: artifact.folder for name, artifact in artifacts.items()})
    if folder.exists() and not replace:
        raise InputError(f"{folder} exists: choose another folder, or pass replace=True")
    stock = with_components(pipe, dict.fromkeys((denoiser_name(pipe), *auxiliary)))
    # the runner may be bound to fractional timesteps that the engine does not know by itself
    bound, own = (() if t.fractional is None else t.fractional for t in (denoiser.timesteps, engine.timesteps))

    def fill(place: Path) -> dict[str, Any]:
        for name, artifact in artifacts.items():
            copy_artifact(artifact, place / name)
        with _without_warnings():
            stock.save_pretrained(place, safe_serialization=True)
        return {
            "pipeline_class": type(pipe).__name__,
            "components": sorted(auxiliary),
            "timesteps": sorted({float(timestep) for timestep in bound} - {float(timestep) for timestep in own}),
        }

    return write_artifact(
        folder,
        kind=KIND,
        base=engine.manifest.base,
        recipe=engine.manifest.recipe,
        fill=fill,
        parents={name: (folder / name, artifact.manifest) for name, artifact in artifacts.items()},
        replace=replace,
    )


def load_engine_pipeline(folder: str | Path, *, context: Context = Context()) -> EnginePipeline:
    """Loads and verifies a pipeline that :func:`save_engine_pipeline` wrote; it generates the same pictures.

    Args:
        folder: where it was saved.
        context: device and dtype of PyTorch's networks; an engine for a GPU runs on the device's.

    Raises:
        InputError: there is no such pipeline in ``folder``.
        IntegrityError: a file was changed.
        MissingEnvironmentError: a library or device is missing.

    Example:
        >>> with load_engine_pipeline("build/pipeline") as opened:
        ...     type(opened.pipe).__name__
        'StableDiffusionPipeline'
    """
    folder = Path(folder)
    manifest = open_artifact(folder, KIND)
    name, index = str(manifest.content.get("pipeline_class")), read_index(folder)
    _check_classes(folder, name, index)
    engine = Engine.open(parent_folder(folder, manifest, _ENGINE))
    saved = _COMPONENTS in manifest.parents
    components = ComponentEngines.open(parent_folder(folder, manifest, _COMPONENTS)) if saved else None
    with ExitStack() as opened:
        loaded = _load_components(engine, components, context.device, opened)
        if sorted(loaded) != sorted(manifest.content.get("components", [])):
            raise IntegrityError(f"{folder} has other components than it was saved with: save the pipeline again")
        stock = load_folder(folder, name, context.torch_dtype)
        schedules = [manifest.content.get("timesteps", [])]
        runner = opened.enter_context(load_engine(engine, schedules=schedules, device=context.device))
        pipeline = _with_engine(stock, engine, runner, loaded, context)
        opened.pop_all()
    return pipeline


def _check_classes(folder: Path, name: str, index: dict[str, Any]) -> None:
    """Raises IntegrityError unless the pipeline is a known one, of components from the libraries that make them."""
    if name not in PIPELINES or name != index.get("_class_name"):
        raise IntegrityError(f"{folder} is a {name}: supported pipelines are {', '.join(PIPELINES)}")
    libraries = {str(entry[0]) for entry in index.values() if isinstance(entry, list) and entry and entry[0]}
    if not libraries <= _LIBRARIES:
        raise IntegrityError(f"{folder} has components of {min(libraries - _LIBRARIES)}: refused")
    check_no_code(folder)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences diffusers' warning that a component which is None cannot be saved; engines are saved beside."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_components(
    engine: Engine, components: ComponentEngines | None, device: str, opened: ExitStack
) -> dict[str, AuxiliaryComponent]:
    """Loads components, which ``opened`` closes; raises as :func:`open_pipeline`."""
    if components is None:
        return {}
    if components.manifest.base.digest != engine.manifest.base.digest:
        raise IntegrityError(
            f"{components.folder} and {engine.folder} are of two pipelines: export the components of this one"
        )
    if components.profile is not None:
        _, height, width = latent_shape_of(engine.denoiser_config)
        sizes = {"height": height, "width": width} | engine.profile.sizes("optimum")
        try:
            components.profile.check_latents(sizes["height"], sizes["width"])
        except InputError as error:
            raise InputError(f"{components.folder}: {error}") from error
    loaded = auxiliary_components(components, device=device)
    for component in loaded.values():
        opened.callback(component.close)
    return loaded


def _with_engine(
    stock: DiffusionPipeline,
    engine: Engine,
    runner: BoundRunner,
    components: dict[str, AuxiliaryComponent],
    context: Context,
) -> EnginePipeline:
    engines: dict[str, EngineComponent] = {**components, denoiser_name(stock): denoiser_from_engine(engine, runner)}
    for component in engines.values():
        component.place(context.torch_device, context.torch_dtype)
    return EnginePipeline(with_components(stock, engines).to(context.torch_device), runner)
