"""``python -m s2p_research calibrate``: a calibration by a recipe of a baseline or an ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.api import as_prompts
from s2p_deploy.cli.options import (
    DeviceOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    OutFolder,
    PromptsOption,
    SettingsOption,
    ThreadsOption,
    context_from_options,
    overrides_from_settings,
    print_estimate,
)
from s2p_deploy.cli.output import artifact_outcome, show


def calibrate(  # noqa: PLR0913 - its options
    model: ModelArgument,
    *,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or the path of a YAML file.")],
    prompts: PromptsOption,
    out: OutFolder,
    dataset: Annotated[Path | None, typer.Option(metavar="DIR", help="The dataset, made there and kept.")] = None,
    settings: SettingsOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Calibrate by a recipe of a baseline or an ablation, as s2p-deploy calibrate does."""
    from s2p_research.recipe import ResearchRecipe

    loaded, chosen = ResearchRecipe.load(recipe, overrides_from_settings(settings)), as_prompts(prompts)
    from s2p_deploy.families import resolve_base
    from s2p_research.calibrate import calibrate as calibrate_recipe

    options = {"dataset": dataset, "replace": force, "on_estimate": print_estimate}
    with context_from_options(device, threads) as context:
        made = calibrate_recipe(resolve_base(model), loaded, chosen, out, context=context, **options)
    return show(artifact_outcome(made.folder, made.manifest), as_json=as_json)
