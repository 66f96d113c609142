"""Engine -> a Triton model repository: two models in one artifact, the engine's own folder inside each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.pipeline import Schedule, timesteps_of
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Manifest, check_vacant, write_artifact
from s2p_deploy.records.copied import copy_artifact
from s2p_deploy.records.disk_room import check_room
from s2p_deploy.serve.triton.model_config import MODEL_FILES, denoiser_config, loop_config
from s2p_deploy.serve.triton.settings import ENGINE, PIPELINE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Engine
    from s2p_deploy.serve.triton.options import RepositoryOptions

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
_PIPELINE_FILES = (".json", ".safetensors", ".txt", ".model")  # what a pipeline's digest covers


def export_repository(
    engine: Engine, base: BasePipeline, out: Path, options: RepositoryOptions, *, replace: bool = False
) -> Manifest:
    """Writes the repository to ``out``: it is whole or not there. The same inputs give the same bytes.

    Both models hold the engine's artifact, byte for byte; on one disk they share its memory (hard links).

    Raises:
        InputError: ``out`` exists and ``replace`` is not set, its disk is too small, or Triton has no backend of its
            own for the engine (``native``).
        IntegrityError: a file of the engine or the pipeline was changed.
    """
    check_vacant(out, replace=replace)
    if options.native:
        check_native(engine)
    copied = tuple(_pipeline_files(base)) if options.with_pipeline else ()
    files = [engine.folder / name for name in engine.manifest.files]
    check_room(out, sum(path.stat().st_size for path in (*files, *copied)) + 2**20)
    schedules = _schedules(engine, base, options)

    def fill(folder: Path) -> dict[str, Any]:
        loop, denoiser = (folder / name / VERSION for name in (options.name, options.denoiser))
        for place in (loop, denoiser):
            place.mkdir(parents=True)
        copy_artifact(engine, loop / ENGINE)
        shutil.copytree(loop / ENGINE, denoiser / ENGINE, copy_function=_linked)
        (loop / "model.py").write_text(_LOOP, encoding="utf-8")
        if options.native:
            _place_native(engine, denoiser)
        else:
            (denoiser / "model.py").write_text(_DENOISER, encoding="utf-8")
        if options.with_pipeline:
            _copy_pipeline(base, copied, loop / PIPELINE)
        texts = {
            loop: loop_config(engine, options, _place_of(base), schedules),
            denoiser: denoiser_config(engine, options, schedules),
        }
        for place, text in texts.items():
            (place.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        return {"model": options.name, "denoiser": options.denoiser, "native": options.native}

    return write_artifact(
        out,
        kind="TritonRepository",
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
    if engine.manifest.content["options"].get("stripped"):
        raise InputError(f"{engine.folder} holds no weights, Triton needs them: build it without --stripped")


def _schedules(engine: Engine, base: BasePipeline, options: RepositoryOptions) -> list[list[float]]:
    """Timesteps of the recipe's and the asked-for step counts, where the engine must know them when it is loaded."""
    if not engine.takes_time_projections:
        return []
    sampling = recipe_from_data(engine.manifest.recipe, str(engine.folder)).sampling
    pipe = load_pipeline(base)
    return [timesteps_of(pipe, Schedule(steps)).tolist() for steps in sorted({sampling.steps, *options.steps})]


def _place_native(engine: Engine, folder: Path) -> None:
    """The engine's file under the name that Triton looks for, and what belongs to it under its own."""
    named = MODEL_FILES[engine.backend]
    for name in engine.engine_files:
        is_model = name.endswith(Path(named).suffix)
        _linked(folder / ENGINE / name, folder / (named if is_model else name))


def _linked(source: str | Path, target: str | Path) -> None:
    """Another name for the same bytes; a copy where the disk has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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


def _place_of(base: BasePipeline) -> str:
    """Where the server finds the pipeline: a folder by its whole path, as its working directory is not known."""
    place = Path(base.base.source)
    return str(place.resolve()) if place.is_dir() else base.base.source
