"""``s2p-deploy dataset``: prompts to a LatentDataset, which recipes that agree in its sections can share."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from s2p_deploy.api import as_prompts
from s2p_deploy.cli.options import (
    DeviceOption,
    EmaOption,
    FileComponentsOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    OutFolder,
    PredictionTypeOption,
    PromptsOption,
    RecipeOption,
    SettingsOption,
    ThreadsOption,
    VaeOption,
    VariantOption,
    context_from_options,
    overrides_from_settings,
    print_estimate,
)
from s2p_deploy.cli.output import Outcome, artifact_outcome, show
from s2p_deploy.context import silent
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from s2p_deploy.calib.dataset import DatasetRequest
    from s2p_deploy.context import Context

_LONGEST_WAIT = timedelta(days=30)  # of a rank for the slowest one; the launcher's half hour is too short


def dataset(  # noqa: PLR0913 - its options
    model: ModelArgument,
    *,
    recipe: RecipeOption,
    prompts: PromptsOption,
    out: OutFolder,
    components: FileComponentsOption = None,
    vae: VaeOption = None,
    prediction_type: PredictionTypeOption = None,
    variant: VariantOption = None,
    ema: EmaOption = False,
    settings: SettingsOption = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of processes that were started by hand.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Index of this process, from 0.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Join the shards of all ranks.")] = False,
    samples_per_call: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most samples of a call; measured on a GPU if omitted."),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Sample latents along the pipeline's own trajectories, for calibrations to share.

    Only the recipe's sections sampling and dataset matter: recipes that agree in them can share the folder. One line on
    stderr says how much will be stored and how long it takes. A run that was stopped continues where it was.

    Several processes share the work under torchrun or accelerate launch (-m s2p_deploy.cli dataset ...), and their
    number changes no byte. Machines that share a folder need no launcher: each runs the command with --ranks and
    --rank, and --merge joins the shards. Device, number of threads and --samples-per-call must be the same for all.
    """
    from s2p_deploy import Recipe

    if (rank is None) != (ranks is None) or (merge and rank is not None):
        raise InputError("--ranks and --rank go together, and --merge without them")
    if rank is not None and ranks is not None and rank >= ranks:
        raise InputError(f"--rank {rank} must be below --ranks {ranks}")
    resolved, chosen = Recipe.load(recipe, overrides_from_settings(settings)), as_prompts(prompts)
    from s2p_deploy.calib import dataset_request
    from s2p_deploy.calib.dataset import merge_shards
    from s2p_deploy.families import resolve_base
    from s2p_deploy.records import BaseOptions

    base = resolve_base(model, BaseOptions(components, vae, prediction_type, variant, ema))
    with context_from_options(device, threads) as plain:
        context = replace(plain, samples_per_call=samples_per_call)
        request = dataset_request(base, resolved, chosen, out, replace=force, rank=rank or 0, ranks=ranks or 1)
        if merge:
            made = merge_shards(request)
            outcome: Outcome | None = artifact_outcome(made.folder, made.manifest)
        elif rank is None:
            outcome = _launched(request, context)
        else:
            outcome = _shards_of_rank(request, context)
    return show(outcome, as_json=as_json) if outcome else 0


def _launched(request: DatasetRequest, context: Context) -> Outcome | None:
    """Makes the dataset with all processes of a launcher (or alone); only the first one returns an outcome."""
    from accelerate import PartialState

    from s2p_deploy.calib import generate_dataset

    state = PartialState(cpu=context.torch_device.type == "cpu", timeout=_LONGEST_WAIT)
    if context.device == "auto":
        context = replace(context, device=str(state.device))
    if not state.is_main_process:
        context = replace(context, progress=silent)
    made = generate_dataset(
        replace(request, rank=state.process_index, ranks=state.num_processes),
        wait=state.wait_for_everyone,
        on_estimate=print_estimate if state.is_main_process else None,
        context=context,
    )
    if state.num_processes > 1:
        state.destroy_process_group()
    return artifact_outcome(made.folder, made.manifest) if state.is_main_process else None


def _shards_of_rank(request: DatasetRequest, context: Context) -> Outcome:
    """Makes the shards of one rank among those that were started by hand."""
    from s2p_deploy.calib.dataset import open_dataset, write_shards

    made = open_dataset(request)
    if made is not None:
        return artifact_outcome(made.folder, made.manifest)
    write_shards(request, on_estimate=print_estimate, context=context)
    missing = [shard.number for shard in request.shards if not shard.path.exists()]
    rank, ranks = request.rank, request.ranks
    data = {"kind": "shards", "path": str(request.work), "rank": rank, "ranks": ranks, "missing": missing}
    rest = f"{len(missing)} of other ranks are missing" if missing else "all are there: join them with --merge"
    return Outcome(data, (f"shards of rank {rank} of {ranks} written to {request.work}; {rest}",))
