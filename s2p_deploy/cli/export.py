"""``s2p-deploy export``: a CalibratedModel to an ExportedGraph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from s2p_deploy.cli.options import ForceOption, JsonOption, ModelOption, OutFolder, base_of
from s2p_deploy.cli.outcome import artifact_outcome, show
from s2p_deploy.cli.progress_bars import progress_bars


def export(  # noqa: PLR0913 - its options
    calibrated: Annotated[Path, typer.Argument(metavar="CALIB", help="What calibrate wrote.")],
    *,
    out: OutFolder,
    dtype: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="fp32 for CPU engines and parity, fp16 for TensorRT.")
    ] = "fp32",
    time_table: Annotated[
        Literal["constant", "input"] | None,
        typer.Option(
            help="Where the projected time features are: in the graph, which runs schedules of integer timesteps, or "
            "an input, which runs all. Features that depend on the prompt too (SDXL, SD3) are always an input."
        ),
    ] = None,
    text_projections: Annotated[
        Literal["graph", "input"],
        typer.Option(
            help="Where the products of the text (keys and values of cross-attention) are computed: in the graph, in "
            "every step, or beside it, once per prompt."
        ),
    ] = "graph",
    sizes: Annotated[
        Literal["fixed", "dynamic"],
        typer.Option(help="Latents of the trained size, or of any height and width that build then bounds."),
    ] = "fixed",
    model: ModelOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Write one QDQ ONNX graph whose activation scales are a timestep-indexed input."""
    from s2p_deploy.records import CalibratedModel

    opened = CalibratedModel.open(calibrated)
    from s2p_deploy.export import export_graph
    from s2p_deploy.families import load_time_path

    needs_path = time_table == "input" and not opened.added_width
    time_path = load_time_path(base_of(opened.manifest, model)) if needs_path else None
    with progress_bars() as progress:
        made = export_graph(
            opened,
            out,
            dtype=dtype,
            time_table=time_table,
            time_path=time_path,
            text_projections=text_projections,
            sizes=sizes,
            replace=force,
            progress=progress,
        )
    return show(artifact_outcome(made.folder, made.manifest), as_json=as_json)
