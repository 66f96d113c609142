"""``s2p-deploy compare``: presets or recipes of one's own side by side on one pipeline."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from s2p_deploy.api import as_prompts
from s2p_deploy.cli.options import (
    DeviceOption,
    EmaOption,
    FileComponentsOption,
    ForceOption,
    JsonOption,
    OutFolder,
    PredictionTypeOption,
    PromptsOption,
    SettingsOption,
    VaeOption,
    VariantOption,
    context_from_options,
    overrides_from_settings,
)
from s2p_deploy.cli.output import Outcome, show, table

if TYPE_CHECKING:
    from rich.table import Table

    from s2p_deploy.validation.compare import ComparedRecipe


def compare(  # noqa: PLR0913 - its options
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Names or YAML files.")],
    *,
    model: Annotated[
        str, typer.Option(help="A folder in diffusers format, a .safetensors file, a hub id (owner/name), or shapes.")
    ],
    prompts: PromptsOption,
    held_out: Annotated[
        str, typer.Option("--held-out", metavar="FILE", help="Prompts to draw; none of the training's.")
    ],
    out: OutFolder,
    components: FileComponentsOption = None,
    vae: VaeOption = None,
    prediction_type: PredictionTypeOption = None,
    variant: VariantOption = None,
    ema: EmaOption = False,
    settings: SettingsOption = None,
    pictures: Annotated[int, typer.Option(min=1, help="How many held-out prompts are drawn.")] = 64,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Calibrate recipes alike and compare their pictures with the pipeline's own. Goes on where it was."""
    from s2p_deploy.recipe import Recipe

    overrides = overrides_from_settings(settings)
    loaded = tuple(Recipe.load(recipe, overrides) for recipe in recipes)
    train, drawn = as_prompts(prompts), as_prompts(held_out)
    from s2p_deploy.families import resolve_base
    from s2p_deploy.records import BaseOptions
    from s2p_deploy.validation.compare import COMPARISON
    from s2p_deploy.validation.compare import compare as compare_recipes

    with context_from_options(device) as context:
        base = resolve_base(model, BaseOptions(components, vae, prediction_type, variant, ema))
        results = compare_recipes(base, loaded, train, drawn.first(pictures), out, replace=force, context=context)
    file = out / COMPARISON
    data = {"comparison": str(file), "recipes": [asdict(result) for result in results]}
    return show(Outcome(data, (_table(results), f"Numbers: {file}")), as_json=as_json)


def _table(results: tuple[ComparedRecipe, ...]) -> Table:
    title = f"Pictures of {results[0].psnr.n} held-out prompts against floating point, PSNR and SQNR in dB"
    columns = ("recipe", "W bits", "A bits", "MB", "PSNR, median", "10th pct", "worst", "SQNR")
    rows = [
        (
            one.name,
            f"{one.weight_bits:.2f}",
            f"{one.activation_bits:.2f}",
            f"{one.size / 1e6:.2f}",
            f"{one.psnr.value:.2f} ({one.psnr.low:.1f} to {one.psnr.high:.1f})",
            f"{one.psnr_tenth.value:.2f}",
            f"{one.worst_psnr:.2f}",
            f"{one.sqnr.value:.2f}",
        )
        for one in results
    ]
    return table(title, columns, rows)
