"""``s2p-deploy components``: a pipeline's text encoders and autoencoder for a backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.cli.build import SpanOption, profile_from_option, span_from_option
from s2p_deploy.cli.options import (
    BackendOption,
    DeviceOption,
    EmaOption,
    FileComponentsOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    OptimizationOption,
    OutFolder,
    PrecisionOption,
    PredictionTypeOption,
    ProviderOption,
    VaeOption,
    VariantOption,
    context_from_options,
)
from s2p_deploy.cli.output import artifact_outcome, show

ComponentsOption = Annotated[
    Path | None,
    typer.Option(
        "--components", metavar="DIR", help="Text encoders and autoencoder on a backend: the folder components wrote."
    ),
]


def components(  # noqa: PLR0913 - its options
    model: ModelArgument,
    *,
    backend: BackendOption,
    out: OutFolder,
    components: FileComponentsOption = None,
    vae: VaeOption = None,
    prediction_type: PredictionTypeOption = None,
    variant: VariantOption = None,
    ema: EmaOption = False,
    precision: PrecisionOption = None,
    provider: ProviderOption = None,
    optimization: OptimizationOption = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX", help="TensorRT: batch sizes, 1:1:4 if omitted; larger ones are computed in slices."
        ),
    ] = None,
    height: SpanOption = None,
    width: SpanOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Build engines of a pipeline's text encoders and autoencoder.

    They stay in floating point. With --components, generate and serve then need no PyTorch network. Engine and
    components must be of the same pipeline (exit 5). The CPU backends take any size; TensorRT's plans are in float16
    (--precision f32: in float32), for the latents' trained size unless --height and --width name others.
    """
    from s2p_deploy.engines.component_engines import build_component_engines
    from s2p_deploy.families import resolve_base
    from s2p_deploy.records import BaseOptions, Execution

    profile = None
    if batch is not None or height is not None or width is not None:
        profile = replace(
            profile_from_option(batch or "1:1:4"),
            height=span_from_option("--height", height),
            width=span_from_option("--width", width),
        )
    with context_from_options(device) as context:
        written = build_component_engines(
            resolve_base(model, BaseOptions(components, vae, prediction_type, variant, ema)),
            out,
            backend=backend,
            execution=Execution(precision, provider, optimization),
            profile=profile,
            replace=force,
            context=context,
        )
    return show(artifact_outcome(out, written.manifest), as_json=as_json)
