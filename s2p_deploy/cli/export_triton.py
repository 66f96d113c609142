"""``s2p-deploy export-triton``: an engine as a model repository of NVIDIA's Triton Inference Server."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from s2p_deploy.api import base_of
from s2p_deploy.cli.options import (
    EngineArgument,
    ForceOption,
    JsonOption,
    ModelOption,
    OutFolder,
    PublicKeyOption,
)
from s2p_deploy.cli.output import artifact_outcome, show
from s2p_deploy.cli.serve import check_installed


def export_triton(  # noqa: PLR0913 - its options
    engine: EngineArgument,
    *,
    out: OutFolder,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the model that clients call; ENGINE's own where left out.")
    ] = None,
    instances: Annotated[int, typer.Option(metavar="N", help="Pictures that are drawn at the same time.")] = 2,
    queue_delay: Annotated[
        int, typer.Option(metavar="MICROSECONDS", help="Longest that a step waits for those of other pictures.")
    ] = 1000,
    fixed_batch: Annotated[
        bool,
        typer.Option("--fixed-batch", help="Pad every step's batch: no picture's bits depend on what else is drawn."),
    ] = False,
    native: Annotated[
        bool | None,
        typer.Option(
            "--native/--python",
            help="Let Triton's own backend run the engine's file (default for TensorRT), or this package.",
        ),
    ] = None,
    with_pipeline: Annotated[
        bool, typer.Option("--with-pipeline", help="Copy the floating-point pipeline into the repository too.")
    ] = False,
    steps: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="A step count besides the recipe's, for engines with fractional timesteps."),
    ] = None,
    most_steps: Annotated[int, typer.Option(metavar="N", help="Most steps that a client may request.")] = 100,
    model: ModelOption = None,
    public_key: PublicKeyOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Write a model repository for NVIDIA's Triton Inference Server.

    The sampling loop is one model and the engine another, which the first calls at every step.
    """
    check_installed("export-triton", ("google.protobuf", "grpc", "tritonclient"))
    from s2p_deploy.signing import open_engine

    opened = open_engine(engine, public_key)
    base = base_of(opened.manifest, model)
    from s2p_deploy.serve.triton.repository import RepositoryOptions, export_repository

    options = RepositoryOptions(
        name=engine.resolve().name if name is None else name,
        instances=instances,
        queue_delay=queue_delay,
        fixed_batch=fixed_batch,
        native=opened.backend == "tensorrt" if native is None else native,
        with_pipeline=with_pipeline,
        steps=tuple(steps or ()),
        most_steps=most_steps,
    )
    outcome = artifact_outcome(out, export_repository(opened, base, out, options, replace=force))
    data = outcome.data | {"model": options.name, "denoiser": options.denoiser, "native": options.native}
    text = (*outcome.text, f"Serve it with: tritonserver --model-repository {out}")
    return show(replace(outcome, data=data, text=text), as_json=as_json)
