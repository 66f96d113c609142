"""``s2p-deploy dataset``: prompts to a LatentDataset, which recipes that agree in its sections can share."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from s2p_deploy.cli.options import (
    ForceOption,
    JsonOption,
    ModelArgument,
    OutFolder,
    PromptsOption,
    SettingsOption,
    device_from_option,
    overrides_from_settings,
    prompts_from_option,
    tell_estimate,
)
from s2p_deploy.cli.outcome import Outcome, artifact_outcome, show
from s2p_deploy.cli.progress_bars import progress_bars
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from s2p_deploy.calib.dataset.shards import DatasetRequest
    from s2p_deploy.families import BasePipeline

_LONGEST_WAIT = timedelta(days=30)  # of a rank for the slowest one; the launcher's half hour is too short


def dataset(  # noqa: PLR0913 - its options
    model: ModelArgument,
    *,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or the path of a YAML file.")],
    prompts: PromptsOption,
    out: OutFolder,
    settings: SettingsOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    ranks: Annotated[int | None, typer.Option(min=1, help="Make the shards of one of so many processes only.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Which of them, from 0.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Join the shards that all ranks have made.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Walk the pipeline's own trajectories and store points of them. A killed run goes on where it was.

    Under torchrun or accelerate launch, every process makes its part. Without, --ranks and --rank divide the work among
    machines that share a folder, and --merge joins it.
    """
    from s2p_deploy.recipe import load_recipe

    if (rank is None) != (ranks is None) or (merge and rank is not None):
        raise InputError("--ranks and --rank go together, and --merge without them")
    if rank is not None and ranks is not None and rank >= ranks:
        raise InputError(f"--rank {rank} must be below --ranks {ranks}")
    resolved, chosen = load_recipe(recipe, overrides_from_settings(settings)), prompts_from_option(prompts)
    from s2p_deploy.calib.dataset.merge import merge_shards
    from s2p_deploy.calib.dataset.shards import dataset_request
    from s2p_deploy.families import resolve_base

    base = resolve_base(model)
    request = dataset_request(base, resolved, chosen, out, replace=force)
    if merge:
        made = merge_shards(request)
        return show(artifact_outcome(made.folder, made.manifest), as_json=as_json)
    outcome = _launched(request, base, device) if rank is None else _part(request, base, device, rank, ranks or 1)
    return show(outcome, as_json=as_json) if outcome else 0


def _launched(request: DatasetRequest, base: BasePipeline, device: str) -> Outcome | None:
    """Makes the dataset with all processes of a launcher, one where there is none; the first of them has an outcome."""
    from accelerate import PartialState

    from s2p_deploy.calib.dataset.generate import load_walker, make_dataset
    from s2p_deploy.calib.dataset.shards import open_finished

    wanted = device_from_option(device)
    state = PartialState(cpu=wanted.type == "cpu", timeout=_LONGEST_WAIT)
    made = open_finished(request)
    if made is None:
        place = state.device if device == "auto" else wanted
        walker = load_walker(
            base, request.recipe.sampling.steps, device=place, rank=state.process_index, ranks=state.num_processes
        )
        with progress_bars() as progress:
            if state.is_main_process:
                walker = replace(walker, progress=progress, tell=tell_estimate)
            made = make_dataset(request, walker, state.wait_for_everyone)
    if state.num_processes > 1:
        state.destroy_process_group()
    return artifact_outcome(made.folder, made.manifest) if state.is_main_process else None


def _part(request: DatasetRequest, base: BasePipeline, device: str, rank: int, ranks: int) -> Outcome:
    """Makes the shards of one rank among those that were started by hand."""
    from s2p_deploy.calib.dataset.generate import load_walker, write_shards
    from s2p_deploy.calib.dataset.shards import open_finished

    made = open_finished(request)
    if made is not None:
        return artifact_outcome(made.folder, made.manifest)
    walker = load_walker(base, request.recipe.sampling.steps, device=device_from_option(device), rank=rank, ranks=ranks)
    with progress_bars() as progress:
        write_shards(request, replace(walker, progress=progress, tell=tell_estimate))
    missing = [shard.number for shard in request.shards if not shard.path.exists()]
    data = {"kind": "shards", "path": str(request.work), "rank": rank, "ranks": ranks, "missing": missing}
    rest = f"{len(missing)} of other ranks are missing" if missing else "all are there: join them with --merge"
    return Outcome(data, (f"shards of rank {rank} of {ranks} written to {request.work}; {rest}",))
