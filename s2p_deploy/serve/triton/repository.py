"""Engine -> a Triton model repository: two models in one artifact, the engine's own folder inside each."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import resolve_base
from s2p_deploy.families.pipelines import check_draws_from_text
from s2p_deploy.pipeline import Schedule, schedules_to_bind
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Manifest, check_vacant, write_artifact
from s2p_deploy.records.artifacts import copy_artifact
from s2p_deploy.records.files import check_room, link_or_copy
from s2p_deploy.records.optional_inputs import is_optional
from s2p_deploy.serve.triton.backend import ENGINE, PIPELINE
from s2p_deploy.serve.triton.model_config import MODEL_FILES, denoiser_config, loop_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Engine

VERSION = "1"
_MODEL = '''"""{title} Written by s2p-deploy export-triton."""

import triton_python_backend_utils

from s2p_deploy.serve.triton.{module} import {model}


class TritonPythonModel:
    def initialize(self, args):
        self.model = {model}(triton_python_backend_utils, args)

    def execute(self, requests):
        return self.model.execute(requests)

    def finalize(self):
        self.model.close()
'''
_LOOP = _MODEL.format(title="The sampling loop.", module="loop_model", model="LoopModel")
_DENOISER = _MODEL.format(title="The denoiser: one step.", module="denoiser_model", model="DenoiserModel")
KIND = "TritonRepository"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_MOST_INSTANCES, _LONGEST_DELAY = 64, 1_000_000
_PIPELINE_FILES = (".json", ".safetensors", ".txt", ".model")  # what a pipeline's digest covers


@dataclass(frozen=True)
class RepositoryOptions:
    """Describes a repository to write.

    ``name`` is the model that clients call; that of the denoiser's model follows from it. ``instances`` sampling loops
    run at once, each with text encoder and VAE of its own. The denoiser waits up to ``queue_delay`` microseconds for
    steps of other loops. With ``fixed_batch`` it always runs on as many samples as all loops together bring, padded: a
    picture's bits then depend on nothing that is drawn beside it. ``native`` leaves the engine's file to Triton's own
    backend for its kind. ``steps`` are step counts besides the recipe's, which an engine with fractional timesteps must
    know ahead; none may be above ``most_steps``.
    """

    name: str
    instances: int = 2
    queue_delay: int = 1000
    fixed_batch: bool = False
    native: bool = False
    with_pipeline: bool = False
    steps: tuple[int, ...] = ()
    most_steps: int = 100

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"{self.name!r} is no name for a model: a letter, then up to 63 letters, digits, - or _; pass --name"
            )
        if not 1 <= self.instances <= _MOST_INSTANCES:
            raise InputError(f"{self.instances} instances: give 1 to {_MOST_INSTANCES}")
        if not 0 <= self.queue_delay <= _LONGEST_DELAY:
            raise InputError(f"a queue delay of {self.queue_delay} microseconds: give 0 to {_LONGEST_DELAY}")
        if self.fixed_batch and self.native:
            raise InputError("a fixed batch is padded by this package: leave --fixed-batch or --native out")
        wrong = [steps for steps in self.steps if not 1 <= steps <= self.most_steps]
        if wrong or self.most_steps < 1:
            raise InputError(f"{(*wrong, self.most_steps)[0]} steps: give 1 to the most, which is {self.most_steps}")

    @property
    def denoiser(self) -> str:
        """Returns the name of the denoiser's model."""
        return f"{self.name}_denoiser"


def export_repository(
    engine: Engine, base: BasePipeline, out: Path, options: RepositoryOptions, *, replace: bool = False
) -> Manifest:
    """Writes the repository to ``out``: it is whole or not there. The same inputs give the same bytes.

    Both models hold the engine's artifact, byte for byte; on one disk they share its memory (hard links).

    Raises:
        InputError: ``out`` may not be written, its disk is too small, or Triton has no backend of its
            own that runs the engine (``native``).
        IntegrityError: a file of the engine or the pipeline was changed.
    """
    check_vacant(out, KIND, replace=replace, inputs={"engine": engine.folder, "pipeline": base.folder})
    if engine.low_noise is not None:
        raise InputError(f"{engine.folder} is two joined engines, which Triton's batcher would mix: give one of them")
    if options.native:
        check_native(engine)
    check_draws_from_text(base.pipeline_class)
    copied = tuple(_pipeline_files(base)) if options.with_pipeline else ()
    files = [engine.folder / name for name in engine.manifest.files]
    check_room(out, sum(path.stat().st_size for path in (*files, *copied)) + 2**20)
    schedules = _schedules(engine, base, options)

    def fill(folder: Path) -> dict[str, Any]:
        loop, denoiser = (folder / name / VERSION for name in (options.name, options.denoiser))
        for place in (loop, denoiser):
            place.mkdir(parents=True)
        copy_artifact(engine, loop / ENGINE)
        shutil.copytree(loop / ENGINE, denoiser / ENGINE, copy_function=link_or_copy)
        (loop / "model.py").write_text(_LOOP, encoding="utf-8")
        if options.native:
            _place_native(engine, denoiser)
        else:
            (denoiser / "model.py").write_text(_DENOISER, encoding="utf-8")
        if options.with_pipeline:
            _copy_pipeline(base, copied, loop / PIPELINE)
        texts = {
            loop: loop_config(engine, options, base.place, schedules),
            denoiser: denoiser_config(engine, options, schedules),
        }
        for place, text in texts.items():
            (place.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        return {"model": options.name, "denoiser": options.denoiser, "native": options.native}

    return write_artifact(
        out,
        kind=KIND,
        base=engine.manifest.base,
        recipe=engine.manifest.recipe,
        fill=fill,
        parents={"engine": (out / options.name / VERSION / ENGINE, engine.manifest)},
        replace=replace,
    )


def check_native(engine: Engine) -> None:
    """Raises InputError where Triton has no backend of its own that runs the engine's file as it is."""
    if engine.backend not in MODEL_FILES:
        raise InputError(
            f"Triton has no backend of its own for {engine.backend} engines: leave --native out, then this package "
            "runs it inside Triton's Python backend"
        )
    if engine.options.stripped:
        raise InputError(f"{engine.folder} holds no weights, Triton needs them: build it without --stripped")
    optional = [spec.name for spec in engine.inputs if is_optional(spec.name)]
    if optional:
        raise InputError(
            f"{engine.folder} takes {optional[0]} for adapters, which Triton's own backends would want in every call:"
            " leave --native out, then this package fills it with zeros"
        )


def _schedules(engine: Engine, base: BasePipeline, options: RepositoryOptions) -> list[list[float]]:
    """Computes the timesteps of all step counts, where the engine must know them when it is loaded."""
    sampling = recipe_from_data(engine.manifest.recipe, str(engine.folder)).sampling
    schedules = [Schedule(steps) for steps in sorted({sampling.steps, *options.steps})]
    timesteps = schedules_to_bind(engine, base, schedules)
    return [values.tolist() for values in timesteps] if engine.takes_time_projections else []


def _place_native(engine: Engine, folder: Path) -> None:
    """Links the engine's file under the name that Triton looks for, and what belongs to it under its own."""
    named = MODEL_FILES[engine.backend]
    for name in engine.engine_files:
        is_model = name.endswith(Path(named).suffix)
        link_or_copy(folder / ENGINE / name, folder / (named if is_model else name))


def _pipeline_files(base: BasePipeline) -> Iterable[Path]:
    tops = (base.folder / name for name in ("model_index.json", "sampling.json"))
    inner = sorted(path for path in base.folder.glob("*/*") if path.suffix in _PIPELINE_FILES)
    return (path for path in (*tops, *inner) if path.is_file())


def _copy_pipeline(base: BasePipeline, files: Iterable[Path], out: Path) -> None:
    for path in files:
        target = out / path.relative_to(base.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if resolve_base(str(out)).base.digest != base.base.digest:
        raise IntegrityError(f"{base.folder} was changed while it was copied")
