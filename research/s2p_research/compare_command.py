"""``python -m s2p_research compare``: recipes side by side on the same held-out prompts."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.api import as_prompts
from s2p_deploy.cli.options import (
    JsonOption,
    OutFolder,
    PromptsOption,
    SchedulesOption,
    SettingsOption,
    overrides_from_settings,
    schedule_from_option,
)
from s2p_deploy.cli.output import Outcome, progress_bars, show, table
from s2p_deploy.errors import S2PError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from s2p_research.comparison import Comparison


def compare(  # noqa: PLR0913 - its options
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Names or YAML files; gains are against the first.")
    ],
    *,
    model: Annotated[str, typer.Option(help="A folder in diffusers format, a hub id (owner/name), or shapes.")],
    prompts: PromptsOption,
    held_out: Annotated[
        str, typer.Option("--held-out", metavar="FILE", help="The prompts that are drawn; none of the training's.")
    ],
    out: OutFolder,
    settings: SettingsOption = None,
    pictures: Annotated[int, typer.Option(min=1, help="How many held-out prompts are drawn.")] = 64,
    schedules: SchedulesOption = None,
    latents_prompts: Annotated[
        int,
        typer.Option("--latents-prompts", min=1, help="Held-out prompts whose latents the SQNR is over."),
    ] = 16,
    force: Annotated[bool, typer.Option("--force", help="Make everything anew instead of going on.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Calibrate recipes alike and compare what they draw: a table and a page. Goes on where it was."""
    from s2p_research.recipe import ResearchRecipe

    overrides = overrides_from_settings(settings)
    loaded = tuple(ResearchRecipe.load(recipe, overrides) for recipe in recipes)
    asked = tuple(schedule_from_option(text) for text in schedules or ())
    train, drawn = as_prompts(prompts), as_prompts(held_out)
    from s2p_deploy.families import resolve_base
    from s2p_research.compare import ComparisonConfig
    from s2p_research.compare import compare as compare_recipes

    config = ComparisonConfig(resolve_base(model), loaded, train, drawn.first(pictures), asked, latents_prompts)
    options = [("--model", model), ("--prompts", prompts), ("--held-out", held_out), ("--pictures", str(pictures))]
    options += [("--latents-prompts", str(latents_prompts))]
    options += [("--schedule", text) for text in schedules or ()] + [("--set", text) for text in settings or ()]
    command = shlex.join(
        ["python", "-m", "s2p_research", "compare", *recipes, *(part for option in options for part in option)]
    )
    with progress_bars() as progress:
        found = compare_recipes(config, out, replace=force, command=f"{command} --out DIR", progress=progress)
    return show(_outcome(found, out), as_json=as_json)


def _outcome(found: Comparison, out: Path) -> Outcome:
    from s2p_research.compare import JSON_FILE, PAGE_FILE

    failure = None
    if found.failed:
        named = "; ".join(f"{recipe.name}: {recipe.message}" for recipe in found.failed)
        failure = S2PError(f"{len(found.failed)} of {len(found.recipes)} recipes failed: {named}")
    data: dict[str, Any] = {
        "comparison": str(out / JSON_FILE),
        "page": str(out / PAGE_FILE),
        "recipes": [
            {
                "name": recipe.name,
                "median_psnr": [one.psnr.median.value for one in recipe.pictures],
                "sqnr": recipe.sqnr.mean.value,
            }
            for recipe in found.results
        ],
        "failed": [{"name": recipe.name, "message": recipe.message} for recipe in found.failed],
    }
    tables = tuple(_table(found, number) for number in range(len(found.floats)))
    return Outcome(data, (*tables, f"Page: {out / PAGE_FILE}", f"Numbers: {out / JSON_FILE}"), failure)


def _table(found: Comparison, schedule: int) -> Table:
    """Makes the table of results; the best of a column has a star."""
    from s2p_research.comparison_table import SHORT, table_of

    made = table_of(found, schedule, SHORT)
    rows = [
        (
            f"{row.name} ({row.note})" if row.kind == "failed" else row.name,
            *(f"{cell.text} ★" if cell.best else cell.text for cell in row.cells),
        )
        for row in made.rows
    ]
    return table(made.title, ("recipe", *made.columns), rows)
