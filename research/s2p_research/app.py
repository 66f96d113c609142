"""The command line of the laboratory: ``python -m s2p_research``."""

from __future__ import annotations

import typer

from s2p_deploy.cli.app import run_app
from s2p_research.calibrate_command import calibrate
from s2p_research.compare_command import compare

app = typer.Typer(
    name="s2p_research",
    help="Baselines and ablations, compared with s2p_deploy's recipes.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options() -> None:
    """Baselines and ablations, compared with s2p_deploy's recipes."""


app.command()(calibrate)
app.command()(compare)


@app.command()
def recipes() -> None:
    """List the recipes of baselines and ablations."""
    from s2p_research.recipe import recipe_names

    for name in recipe_names():
        typer.echo(name)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code, as ``s2p-deploy`` does."""
    return run_app(app, "s2p_research", arguments)
