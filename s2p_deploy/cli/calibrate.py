"""``s2p-deploy calibrate``: prompts to a CalibratedModel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from s2p_deploy.cli.options import (
    ForceOption,
    JsonOption,
    ModelArgument,
    OutFolder,
    SettingsOption,
    device_from_option,
    overrides_from_settings,
    prompts_from_option,
    tell_estimate,
)
from s2p_deploy.cli.outcome import artifact_outcome, show
from s2p_deploy.cli.progress_bars import progress_bars

_DEFAULT_SCALES = "its activation scales are defaults: engines have their real size and speed, but draw no pictures"


def calibrate(  # noqa: PLR0913 - its options
    model: ModelArgument,
    *,
    recipe: Annotated[str, typer.Option(help="A recipe's name (w4a8, w8a8, fp, ...), or the path of a YAML file.")],
    out: OutFolder,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts to walk, as for dataset; fp and ptq-stream need none."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An edited plan.yaml that decides the formats in place of the recipe's."),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CALIB",
            help="A calibrated model to go on from; with scales.activations=given, one to take activation scales from.",
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The dataset: from s2p-deploy dataset, or made there and kept for others."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where it trains: cpu, cuda or cuda:N.")] = "cpu",
    settings: SettingsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Train weights and timestep-indexed scales from prompts alone. A killed run goes on where it was."""
    from s2p_deploy.recipe import load_recipe

    resolved = load_recipe(recipe, overrides_from_settings(settings))
    chosen = None if prompts is None else prompts_from_option(prompts)
    from s2p_deploy.calib import calibrate as calibrate_pipeline
    from s2p_deploy.families import resolve_base
    from s2p_deploy.records import CalibratedModel
    from s2p_deploy.records.precision_plan import read_plan

    options: dict[str, Any] = {
        "plan": None if plan is None else read_plan(plan),
        "initial": None if initial is None else CalibratedModel.open(initial),
        "dataset": dataset,
        "device": str(device_from_option(device)),
        "replace": force,
        "tell": tell_estimate,
    }
    with progress_bars() as progress:
        made = calibrate_pipeline(resolve_base(model), resolved, chosen, out, progress=progress, **options)
    outcome = artifact_outcome(made.folder, made.manifest)
    if resolved.scales.activations == "default":
        outcome = replace(outcome, data=outcome.data | {"note": _DEFAULT_SCALES}, text=(*outcome.text, _DEFAULT_SCALES))
    return show(outcome, as_json=as_json)
