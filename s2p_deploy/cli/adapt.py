"""``s2p-deploy adapt``: a CalibratedModel and LoRAs to the CalibratedModel with them in, and to its engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.api import new_folder
from s2p_deploy.cli.options import ForceOption, JsonOption, ModelOption, OutFolder, ThreadsOption, context_from_options
from s2p_deploy.cli.output import Outcome, artifact_outcome, show, with_pipeline
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from s2p_deploy.context import Context
    from s2p_deploy.engines import BuildOptions
    from s2p_deploy.records import CalibratedModel, Engine


def _engine_folder(folder: Path | None) -> Path | None:
    return None if folder is None else new_folder(folder)


def adapt(  # noqa: PLR0913 - its options
    calibrated: Annotated[
        Path, typer.Argument(metavar="CALIB", help="A calibrated model: the folder that calibrate wrote.")
    ],
    *,
    lora: Annotated[
        list[str],
        typer.Option(
            "--lora",
            metavar="FILE[:WEIGHT]",
            help="A LoRA to fuse into the weights, e.g. ink.safetensors:0.8; repeatable.",
        ),
    ],
    out: OutFolder,
    engine: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of an engine to build too; its graph goes to DIR-graph.",
            callback=_engine_folder,
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(metavar="ENGINE", help="An engine of CALIB: --engine is exported and built as it was."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Backend of --engine, with its defaults, where there is no engine like it."),
    ] = None,
    model: ModelOption = None,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Put LoRAs into a calibrated model in a minute: fit the weights that they touch, keep everything else.

    Plan and activation scales stay as they were calibrated. The pipeline with the LoRAs in its weights is written to
    pipeline-<digest> beside --out, and is the floating-point pipeline of the new model and its engines. A LoRA that
    changes pictures a lot deserves a calibration of its own: calibrate MODEL --lora.
    """
    from s2p_deploy import api
    from s2p_deploy.records import check_vacant

    if engine is not None and (like is None) == (backend is None):
        raise InputError("--engine needs either --like ENGINE or --backend NAME, to say how it is built")
    if engine is None and (like or backend):
        raise InputError("--like and --backend are for --engine DIR: give one, or leave them out")
    settings = None if engine is None else _settings(like, backend)
    if engine is not None:
        inputs = {"calibrated model": calibrated, "adapted model": out} | ({} if like is None else {"engine": like})
        check_vacant(engine, "Engine", replace=force, inputs=inputs)
        check_vacant(_graph_folder(engine), "ExportedGraph", replace=force, inputs=inputs)
    with context_from_options(threads=threads) as context:
        made = api.adapt(calibrated, lora=lora, out=out, model=model, force=force, context=context)
        outcome = with_pipeline(artifact_outcome(made.folder, made.manifest), made.manifest)
        if settings is not None and engine is not None:
            built = _built(made, engine, settings, context, force=force)
            outcome = _with_engine(outcome, built)
    return show(outcome, as_json=as_json)


@dataclass(frozen=True)
class _Settings:
    """How an engine is exported (keywords of ``export_graph``) and built."""

    backend: str
    export: dict[str, Any]
    options: BuildOptions | None = None


def _settings(like: Path | None, backend: str | None) -> _Settings:
    """Reads how an engine was made, or takes a backend's defaults.

    Raises:
        InputError: there is no such engine or backend, or the engine's graph is not where it was.
        IntegrityError: an artifact was changed. MissingEnvironmentError: the backend's library is missing.
    """
    from s2p_deploy.engines import BuildOptions, usable_backend
    from s2p_deploy.records import ExportedGraph, parent_folder

    if like is None:
        return _Settings(str(backend), {"dtype": usable_backend(str(backend)).capabilities().dtypes[0]})
    from s2p_deploy.api import as_engine

    engine = as_engine(like)
    if engine.low_noise is not None:
        raise InputError(f"--like {like} is two joined engines: give the first one, adapt the other too, and join them")
    usable_backend(engine.backend)
    graph = ExportedGraph.open(parent_folder(engine.folder, engine.manifest, "graph"))
    content = graph.manifest.content
    forms = {name: content[name] for name in ("dtype", "time_table", "text_projections")}
    options = BuildOptions.from_json(engine.manifest.content["options"])
    return _Settings(engine.backend, forms | {"sizes": "dynamic" if graph.latents else "fixed"}, options)


def _graph_folder(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}-graph")


def _built(made: CalibratedModel, out: Path, settings: _Settings, context: Context, *, force: bool) -> Engine:
    """Exports and builds an adapted model."""
    from s2p_deploy import api

    graph = api.export_graph(made, out=_graph_folder(out), force=force, context=context, **settings.export)
    return api.build_engine(
        graph, backend=settings.backend, out=out, options=settings.options, force=force, context=context
    )


def _with_engine(outcome: Outcome, engine: Engine) -> Outcome:
    built = artifact_outcome(engine.folder, engine.manifest)
    return replace(outcome, data=outcome.data | {"engine": built.data}, text=(*outcome.text, *built.text))
