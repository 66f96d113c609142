"""``s2p-deploy export``: a CalibratedModel to an ExportedGraph."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from s2p_deploy.cli.options import ForceOption, JsonOption, ModelOption, OutFolder, context_from_options
from s2p_deploy.cli.output import artifact_outcome, show
from s2p_deploy.errors import InputError


def export(  # noqa: PLR0913 - its options
    calibrated: Annotated[
        Path, typer.Argument(metavar="CALIB", help="A calibrated model: the folder that calibrate wrote.")
    ],
    *,
    out: OutFolder,
    dtype: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="fp32 for CPU engines and parity, fp16 for TensorRT.")
    ] = "fp32",
    time_table: Annotated[
        Literal["constant", "input"] | None,
        typer.Option(
            help="Projected time features as constants or as an input. Those that depend on the prompt too (SDXL, SD3) "
            "are always an input."
        ),
    ] = None,
    text_projections: Annotated[
        Literal["graph", "input"],
        typer.Option(
            help="Keys and values of cross-attention: computed in the graph in every step, or once per prompt as an "
            "input."
        ),
    ] = "graph",
    sizes: Annotated[
        Literal["fixed", "dynamic"],
        typer.Option(help="Latents of the trained size, or of any size, within bounds that build sets."),
    ] = "fixed",
    chunks: Annotated[
        str | None,
        typer.Option(
            metavar="MIN..MAX",
            help="Chunks of text, e.g. 1..4: long prompts as texts of several chunks, each as long as the encoder's "
            "own; one if omitted.",
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            help="Slots for LoRAs at run time: a low-rank branch of so many ranks beside layers, shared by all LoRAs "
            "that act at once.",
        ),
    ] = None,
    lora_layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Which layers have slots: attention (if omitted), feed-forward, projections, convolutions; may be "
            "repeated.",
        ),
    ] = None,
    lora_for: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Slots at exactly the layers that this LoRA changes; may be repeated."),
    ] = None,
    controlnet: Annotated[
        bool, typer.Option("--controlnet", help="Inputs for the residuals of ControlNets, which engines then take.")
    ] = False,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Image prompts at run time: a second cross-attention for up to so many tokens of an IP-Adapter (4 an "
            "image, 16 of a Plus adapter).",
        ),
    ] = None,
    image_adapters: Annotated[
        int | None, typer.Option(metavar="M", help="How many IP-Adapters may act at once; one if omitted.")
    ] = None,
    model: ModelOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Write a calibrated model as one QDQ ONNX graph with timestep-indexed scales.

    An engine of the constant form of the time table runs schedules of integer timesteps, one of the input form all
    schedules. At the trained size, a graph of dynamic sizes computes the same numbers as one of fixed size.
    """
    from s2p_deploy import api

    span = None if chunks is None else chunks_from_option(chunks)
    with context_from_options() as context:
        made = api.export_graph(
            calibrated,
            out=out,
            dtype=dtype,
            time_table=time_table,
            text_projections=text_projections,
            sizes=sizes,
            chunks=span,
            lora_rank=lora_rank,
            lora_layers=lora_layers or (),
            lora_for=lora_for or (),
            controlnet=controlnet,
            image_tokens=image_tokens,
            image_adapters=image_adapters,
            model=model,
            force=force,
            context=context,
        )
    return show(artifact_outcome(made.folder, made.manifest), as_json=as_json)


def chunks_from_option(text: str) -> tuple[int, int]:
    """Parses ``MIN..MAX`` chunks of text. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d{1,3})\.\.(\d{1,3})", text, re.ASCII)
    if found is None:
        raise InputError(f"--chunks {text!r} must be MIN..MAX, e.g. 1..4")
    return int(found[1]), int(found[2])
