"""``s2p-deploy components``: a pipeline's text encoders and autoencoder for a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.cli.options import (
    ForceOption,
    JsonOption,
    ModelArgument,
    OptimizationOption,
    OutFolder,
    PrecisionOption,
    ProviderOption,
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
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="openvino or onnxruntime.")],
    out: OutFolder,
    precision: PrecisionOption = None,
    provider: ProviderOption = None,
    optimization: OptimizationOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Build engines of a pipeline's text encoders and autoencoder.

    They stay in floating point. With --components, generate and serve then need no PyTorch network. Engine and
    components must be of the same pipeline (exit 5).
    """
    from s2p_deploy.engines.component_engines import build_component_engines
    from s2p_deploy.families import resolve_base
    from s2p_deploy.records import Execution

    with context_from_options() as context:
        written = build_component_engines(
            resolve_base(model),
            out,
            backend=backend,
            execution=Execution(precision, provider, optimization),
            replace=force,
            context=context,
        )
    return show(artifact_outcome(out, written.manifest), as_json=as_json)
