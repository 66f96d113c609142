"""An engine on disk as a stock pipeline, and a pipeline with an engine kept in one folder."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import diffusers

from s2p_deploy.engines import load_engine
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import denoiser_of, load_pipeline, with_components
from s2p_deploy.families.base import base_of, check_base, check_no_code, read_json
from s2p_deploy.families.pipelines import PIPELINES, denoiser_name
from s2p_deploy.pipeline.component import EngineComponent, denoiser_from_engine
from s2p_deploy.pipeline.drawing import timesteps_of
from s2p_deploy.pipeline.parts import PartComponent, part_components
from s2p_deploy.records import Engine, open_artifact, parent_folder, write_artifact
from s2p_deploy.records.copied import copy_artifact
from s2p_deploy.records.pipeline_parts import PipelineParts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from diffusers import DiffusionPipeline

    from s2p_deploy.engines import BoundRunner
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.pipeline.drawing import Schedule
    from s2p_deploy.records import Manifest
    from s2p_deploy.timesteps import Timesteps

KIND = "Pipeline"
_ENGINE, _PARTS = "engine", "parts"
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}  # the last is diffusers' name for its safety checker's


@dataclass(frozen=True)
class EnginePipeline:
    """A stock pipeline with an engine in it, and the engine's runner. A context manager: leaving it closes both."""

    pipe: DiffusionPipeline
    runner: BoundRunner

    def close(self) -> None:
        """Frees what the engine, and text encoders and autoencoder that are not PyTorch's, hold."""
        for component in self.pipe.components.values():
            if isinstance(component, PartComponent):
                component.close()
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_engine_pipeline(
    engine: Engine,
    base: BasePipeline | None = None,
    *,
    schedules: Sequence[Schedule] = (),
    parts: PipelineParts | None = None,
) -> EnginePipeline:
    """The stock pipeline of an engine. Networks that the engine and ``parts`` stand for are not read.

    Args:
        engine: what stands where the denoiser stood.
        base: the floating-point pipeline that it was made from (None: where it was then).
        schedules: every schedule that will be asked for; those with fractional timesteps must be named here.
        parts: text encoders and autoencoder on a backend (None: PyTorch's).

    Raises:
        InputError: there is no such pipeline, or the engine does not run one of ``schedules``.
        IntegrityError: a file was changed, or ``base`` or ``parts`` is of another pipeline.
        MissingEnvironmentError: a library or device is missing.
    """
    if base is None:
        base = base_of(engine.manifest)
    check_base(base, engine.manifest)
    given = _opened_parts(engine, parts)
    name = base.kind.component
    stock = load_pipeline(base, without={name, *given})
    timesteps = [timesteps_of(stock, schedule) for schedule in schedules]
    return _with_engine(stock, engine, timesteps, given)


def save_engine_pipeline(pipe: DiffusionPipeline, folder: Path, *, replace: bool = False) -> Manifest:
    """Keeps a pipeline with an engine: its stock components as diffusers saves them, the engine and parts as they are.

    Raises:
        InputError: ``folder`` exists, its disk has no room, or the denoiser is not that of an engine on disk.
        IntegrityError: the engine or the parts were changed since they were opened.
    """
    denoiser = denoiser_of(pipe)
    if not isinstance(denoiser, EngineComponent):
        raise InputError("this pipeline's denoiser is no engine: save it with save_pretrained")
    engine = denoiser.saved_engine()
    kept = {name: part for name, part in pipe.components.items() if isinstance(part, PartComponent)}
    inside: dict[str, Engine | PipelineParts] = {_ENGINE: engine}
    if kept:
        inside[_PARTS] = next(iter(kept.values())).parts
    stock = with_components(pipe, dict.fromkeys((denoiser_name(pipe), *kept)))

    def fill(place: Path) -> dict[str, Any]:
        for name, artifact in inside.items():
            copy_artifact(artifact, place / name)
        stock.save_pretrained(place, safe_serialization=True)
        return {
            "pipeline_class": type(pipe).__name__,
            "components": sorted(kept),
            "timesteps": _fractional(denoiser, engine),
        }

    return write_artifact(
        folder,
        kind=KIND,
        base=engine.manifest.base,
        recipe=engine.manifest.recipe,
        fill=fill,
        parents={name: (folder / name, artifact.manifest) for name, artifact in inside.items()},
        replace=replace,
    )


def load_engine_pipeline(folder: Path) -> EnginePipeline:
    """What :func:`save_engine_pipeline` kept, verified; it draws the same pictures.

    Raises:
        InputError: there is no such pipeline in ``folder``.
        IntegrityError: a file was changed. MissingEnvironmentError: a library or device is missing.
    """
    manifest = open_artifact(folder, KIND)
    name, index = str(manifest.content.get("pipeline_class")), read_json(folder / "model_index.json")
    _check_classes(folder, name, index)
    engine = Engine.open(parent_folder(folder, manifest, _ENGINE))
    parts = PipelineParts.open(parent_folder(folder, manifest, _PARTS)) if _PARTS in manifest.parents else None
    given = _opened_parts(engine, parts)
    if sorted(given) != sorted(manifest.content.get("components", [])):
        raise IntegrityError(f"{folder} has other parts than it was saved with: save the pipeline again")
    absent = {key: None for key, entry in index.items() if entry == [None, None]}
    stock = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, local_files_only=True, **absent)
    return _with_engine(stock, engine, [manifest.content.get("timesteps", [])], given)


def _check_classes(folder: Path, name: str, index: dict[str, Any]) -> None:
    """Raises IntegrityError unless the pipeline is a known one, of components from the libraries that make them."""
    if name not in PIPELINES or name != index.get("_class_name"):
        raise IntegrityError(f"{folder} is a {name}: supported pipelines are {', '.join(PIPELINES)}")
    libraries = {str(entry[0]) for entry in index.values() if isinstance(entry, list) and entry and entry[0]}
    if not libraries <= _LIBRARIES:
        raise IntegrityError(f"{folder} has components of {min(libraries - _LIBRARIES)}: refused")
    check_no_code(folder)


def _with_engine(
    stock: DiffusionPipeline, engine: Engine, timesteps: Sequence[Timesteps], given: dict[str, PartComponent]
) -> EnginePipeline:
    runner = load_engine(engine, schedules=timesteps)
    denoiser = denoiser_from_engine(engine, runner)
    return EnginePipeline(with_components(stock, given | {denoiser_name(stock): denoiser}), runner)


def _opened_parts(engine: Engine, parts: PipelineParts | None) -> dict[str, PartComponent]:
    if parts is None:
        return {}
    if parts.manifest.base.digest != engine.manifest.base.digest:
        raise IntegrityError(f"{parts.folder} and {engine.folder} are of two pipelines: export the parts of this one")
    return part_components(parts)


@contextmanager
def _silent_about_absent_components() -> Iterator[None]:
    """Diffusers logs that None cannot be saved."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fractional(denoiser: EngineComponent, engine: Engine) -> list[float]:
    """The fractional timesteps that a denoiser's runner is bound to and its engine does not know by itself."""
    bound, own = (() if t.fractional is None else t.fractional for t in (denoiser.timesteps, engine.timesteps))
    return sorted({float(timestep) for timestep in bound} - {float(timestep) for timestep in own})
