"""``s2p-deploy parts``: a pipeline's text encoders and autoencoder for a backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2p_deploy.cli.options import ForceOption, JsonOption, ModelArgument, OutFolder
from s2p_deploy.cli.outcome import artifact_outcome, show
from s2p_deploy.cli.progress_bars import progress_bars
from s2p_deploy.errors import IntegrityError

if TYPE_CHECKING:
    from s2p_deploy.records.pipeline_parts import PipelineParts

PartsOption = Annotated[
    Path | None,
    typer.Option(metavar="PARTS", help="What parts wrote: text encoders and autoencoder without PyTorch."),
]


def parts(
    model: ModelArgument,
    *,
    backend: Annotated[str, typer.Option(help="openvino or onnxruntime.")],
    out: OutFolder,
    hint: Annotated[
        str | None, typer.Option(metavar="HINT", help="Of the backend; its default where left out.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Export the text encoders and the autoencoder of a pipeline in floating point, for generate and serve."""
    from s2p_deploy.engines.pipeline_parts import export_parts
    from s2p_deploy.families import resolve_base

    with progress_bars() as progress:
        written = export_parts(resolve_base(model), backend, out, hint=hint, replace=force, progress=progress)
    return show(artifact_outcome(out, written.manifest), as_json=as_json)


def open_parts(folder: Path | None, public_key: Path | None) -> PipelineParts | None:
    """What ``--parts`` names; with ``public_key``, only what was signed with its private half.

    Raises:
        InputError: there is no such artifact. IntegrityError: it was changed, or is not signed with that key.
    """
    from s2p_deploy.records.pipeline_parts import PipelineParts
    from s2p_deploy.signing import check_signature

    if folder is None:
        return None
    signed = None if public_key is None else check_signature(folder, public_key)
    opened = PipelineParts.open(folder)
    if signed is not None and opened.manifest != signed:
        raise IntegrityError(f"{folder} was changed while it was opened")
    return opened
