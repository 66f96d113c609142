"""``s2p-deploy join``: two engines to one, of which the second runs the last timesteps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.api import BOUNDARY_RATIO
from s2p_deploy.cli.options import EngineArgument, ForceOption, JsonOption, OutFolder
from s2p_deploy.cli.output import artifact_outcome, show


def join(
    engine: EngineArgument,
    *,
    low_noise: Annotated[
        Path,
        typer.Option(metavar="ENGINE", help="The engine that runs the last timesteps, such as one of recipe fp."),
    ],
    out: OutFolder,
    boundary_ratio: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Of the training timesteps, how many the low-noise engine runs."),
    ] = BOUNDARY_RATIO,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Join an engine with a more precise one for the last timesteps, where rounding is seen in the picture.

    Both are built from exports with the same options, for the same device and sizes. The result holds copies of both,
    and both are in memory when it runs. It is used as an engine, but for export-triton; validate compares graph and
    layers of the first one, and pictures of both.
    """
    from s2p_deploy import api

    joined = api.join_engines(engine, low_noise, out=out, boundary_ratio=boundary_ratio, force=force)
    return show(artifact_outcome(joined.folder, joined.manifest), as_json=as_json)
