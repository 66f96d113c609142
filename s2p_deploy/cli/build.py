"""``s2p-deploy build``: an ExportedGraph to an Engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.cli.options import ForceOption, JsonOption, OutFolder
from s2p_deploy.cli.outcome import artifact_outcome, show
from s2p_deploy.cli.progress_bars import progress_bars


def build(
    graph: Annotated[Path, typer.Argument(metavar="GRAPH", help="What export wrote.")],
    *,
    backend: Annotated[str, typer.Option(help="onnxruntime, openvino, tensorrt_rtx or tensorrt.")],
    out: OutFolder,
    hint: Annotated[str | None, typer.Option(help="Precision hint of the backend, e.g. f32 or bf16.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Build a backend's engine from the graph, in a child process."""
    from s2p_deploy.records import ExportedGraph

    opened = ExportedGraph.open(graph)
    from s2p_deploy.engines import BuildOptions, build_engine

    with progress_bars() as progress:
        made = build_engine(opened, backend, out, options=BuildOptions(hint), replace=force, progress=progress)
    return show(artifact_outcome(made.folder, made.manifest), as_json=as_json)
