"""Prompts to a LatentDataset: in shards, by any number of processes, and after any kill with what is missing."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy import __version__
from s2p_deploy.calib.dataset.estimate import Estimate, point_bytes, seconds_per_call, text_bytes
from s2p_deploy.calib.dataset.merge import merge_shards
from s2p_deploy.calib.dataset.sampler import Sampler
from s2p_deploy.calib.dataset.shards import DatasetRequest, claim_work, claimed_rank, missing_shards, open_finished
from s2p_deploy.calib.dataset.texts import texts_once
from s2p_deploy.calib.dataset.trajectories import (
    Itinerary,
    call_rows,
    choose_calls,
    schedule_table,
    slot_queues,
    walk,
    walk_length,
)
from s2p_deploy.families import hot_denoiser_of, load_pipeline, text_tokens
from s2p_deploy.progress import silent
from s2p_deploy.records import LatentDataset
from s2p_deploy.records.disk_room import check_room
from s2p_deploy.records.whole_files import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.calib.dataset.shards import Shard
    from s2p_deploy.calib.dataset.texts import PromptTexts
    from s2p_deploy.calib.dataset.trajectories import StoredPoint
    from s2p_deploy.families import BasePipeline, HotDenoiser
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Base, PromptSet

_CPU = torch.device("cpu")
_LESS_ROOM = "make room, choose another --out, or lower dataset.prompts or dataset.points_per_prompt"


@dataclass(frozen=True)
class Walker:
    """One of ``ranks`` processes that make a dataset together, what it walks with and on which device.

    ``tell`` is given what there is to do before it begins, for which the denoiser is timed.
    """

    pipe: DiffusionPipeline
    teacher: HotDenoiser
    device: torch.device = _CPU
    rank: int = 0
    ranks: int = 1
    progress: Progress = silent
    tell: Callable[[Estimate], None] | None = None

    def takes(self, shard: Shard) -> bool:
        """Whether a shard is this process's."""
        return shard.number % self.ranks == self.rank

    def conditions(self) -> dict[str, Any]:
        """What decides the bits of a walk, besides the request."""
        name = f"cuda ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else self.device.type
        return {
            "scheduler": type(self.pipe.scheduler).__name__,
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "device": name,
            "version": f"{__version__}, torch {torch.__version__}",
        }


def load_walker(
    base: BasePipeline, steps: int, *, device: torch.device = _CPU, rank: int = 0, ranks: int = 1
) -> Walker:
    """A walker of a pipeline on disk, for walks of so many steps.

    Raises:
        InputError: the pipeline cannot be loaded, or its scheduler has no such schedule.
    """
    pipe = load_pipeline(base)
    return Walker(pipe, hot_denoiser_of(pipe, steps).eval(), device, rank, ranks)


def generate_dataset(  # noqa: PLR0913 - what a dataset is made from, by whom, and where to
    pipe: DiffusionPipeline,
    teacher: HotDenoiser,
    base: Base,
    prompts: PromptSet,
    recipe: Recipe,
    *,
    out: Path,
    progress: Progress = silent,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device = _CPU,
    wait: Callable[[], object] = lambda: None,
    tell: Callable[[Estimate], None] | None = None,
) -> LatentDataset:
    """Makes the dataset of all ``prompts`` by a resolved recipe at ``out``, or opens it where it is whole.

    Of the recipe, only ``sampling`` and ``dataset`` matter. Unfinished work stands beside it in ``<out>.shards``. With
    several ``ranks`` every process calls this with its own ``rank``, and ``wait`` returns once all have called it.
    ``tell`` is given what there is to do before it begins.

    Raises:
        InputError: another dataset or another process's work stands there, the disk has no room, or the scheduler has
            fractional timesteps.
        IntegrityError: the dataset at ``out`` was changed.
    """
    request = DatasetRequest(base, prompts, recipe, out)
    walker = Walker(pipe, teacher, device, rank, ranks, progress, tell)
    return open_finished(request) or make_dataset(request, walker, wait)


def make_dataset(request: DatasetRequest, walker: Walker, wait: Callable[[], object] = lambda: None) -> LatentDataset:
    """Makes a dataset whose finished form does not stand there; rank 0 merges. As :func:`generate_dataset`."""
    write_shards(request, walker)
    wait()
    if walker.rank == 0:
        merge_shards(request)
    wait()
    return LatentDataset.open(request.out)


def write_shards(request: DatasetRequest, walker: Walker) -> None:
    """Writes those of the walker's shards that are missing to the request's work folder.

    Raises:
        InputError: as :func:`generate_dataset`.
    """
    chosen = _chosen_calls(request, walker)
    conditions = walker.conditions()
    missing = [prompt for shard in missing_shards(request, conditions) for prompt in shard.prompts]
    size = _bytes(request, walker, sum(len(chosen[prompt]) for prompt in missing))
    check_room(request.work, size, _LESS_ROOM)
    with claimed_rank(request, walker.rank, walker.ranks), _placed(walker):
        claim_work(request, conditions)
        own = [shard for shard in missing_shards(request, conditions) if walker.takes(shard)]
        queues = _joint_queues(own, chosen, request.recipe.dataset.width)
        if own and walker.tell is not None:
            walker.tell(_estimate(request, walker, queues, chosen))
        texts = texts_once(walker.pipe, request.prompts, request.recipe.sampling.max_sequence_length, request.texts)
        _walk(request, walker, own, queues, _itineraries(request, chosen, texts))


def _chosen_calls(request: DatasetRequest, walker: Walker) -> list[tuple[int, ...]]:
    """The stored calls of every prompt."""
    dataset, calls = request.recipe.dataset, len(_rows(request, walker))
    return [
        choose_calls(prompt, calls, dataset.points_per_prompt, dataset.timesteps) for prompt in request.prompts.prompts
    ]


def _rows(request: DatasetRequest, walker: Walker) -> tuple[int, ...]:
    """The row of every call; sets the scheduler's timesteps."""
    scheduler, steps = walker.pipe.scheduler, request.recipe.sampling.steps
    scheduler.set_timesteps(steps)
    return call_rows(scheduler, schedule_table(walker.pipe, walker.teacher, steps))


def _joint_queues(shards: Sequence[Shard], chosen: Sequence[tuple[int, ...]], width: int) -> list[list[int]]:
    """The shards' own queues, one shard's behind the other's: a slot that is done with one goes on with the next.

    What its neighbors walk changes no bit of a slot's answers, so neither does when its turn comes.
    """
    joint: list[list[int]] = [[] for _ in range(width)]
    for shard in shards:
        lengths = {prompt: walk_length(chosen[prompt]) for prompt in shard.prompts}
        for queue, more in zip(joint, slot_queues(lengths, width, shard.number), strict=True):
            queue.extend(more)
    return joint


def _bytes(request: DatasetRequest, walker: Walker, points: int) -> int:
    """What so many stored points take on the disk, with the texts where they are not there yet."""
    texts = 0 if request.texts.exists() else text_bytes(request.prompts, walker.teacher, _tokens(request, walker))
    return points * point_bytes(walker.teacher) + texts


def _estimate(
    request: DatasetRequest, walker: Walker, queues: Sequence[Sequence[int]], chosen: Sequence[tuple[int, ...]]
) -> Estimate:
    calls = max(sum(walk_length(chosen[prompt]) for prompt in queue) for queue in queues)
    width = request.recipe.dataset.width
    points = sum(len(chosen[prompt]) for queue in queues for prompt in queue)
    per_call = seconds_per_call(walker.teacher, width, _tokens(request, walker))
    return Estimate(points, _bytes(request, walker, points), calls, 2 * width, calls * per_call)


def _tokens(request: DatasetRequest, walker: Walker) -> int:
    return text_tokens(walker.pipe, request.recipe.sampling.max_sequence_length)


def _itineraries(request: DatasetRequest, chosen: Sequence[tuple[int, ...]], texts: PromptTexts) -> list[Itinerary]:
    each = zip(request.prompts.prompts, chosen, texts.cond.tolist(), texts.uncond.tolist(), strict=True)
    distinct = texts.distinct
    return [Itinerary(prompt, calls, distinct[cond], distinct[uncond]) for prompt, calls, cond, uncond in each]


def _walk(
    request: DatasetRequest,
    walker: Walker,
    shards: Sequence[Shard],
    queues: Sequence[Sequence[int]],
    itineraries: Sequence[Itinerary],
) -> None:
    """Walks all queues and writes each shard when the last of its prompts has arrived."""
    guidance = request.recipe.sampling.guidance_scale
    assert guidance is not None, "the recipe is resolved"
    total = sum(itineraries[p].length for shard in request.shards if walker.takes(shard) for p in shard.prompts)
    done = total - sum(itineraries[p].length for queue in queues for p in queue)
    walker.progress("dataset", done, total)
    shard_of = {prompt: shard for shard in shards for prompt in shard.prompts}
    arrived: dict[int, list[StoredPoint]] = {}
    sampler = Sampler(walker.pipe.scheduler, _rows(request, walker))
    for prompt, points in walk(walker.teacher, sampler, itineraries, queues, guidance_scale=guidance):
        if points is not None:
            arrived[prompt] = points
            shard = shard_of[prompt]
            if all(member in arrived for member in shard.prompts):
                write_tensors(shard.path, _shard_tensors({member: arrived.pop(member) for member in shard.prompts}))
        done += 1
        walker.progress("dataset", done, total)


def _shard_tensors(points: dict[int, list[StoredPoint]]) -> dict[str, Tensor]:
    flat = [(prompt, point) for prompt, stored in points.items() for point in stored]
    return {
        "latents": torch.stack([point.latents for _, point in flat]),
        "cond": torch.stack([point.cond for _, point in flat]),
        "uncond": torch.stack([point.uncond for _, point in flat]),
        "rows": torch.tensor([point.row for _, point in flat]),
        "prompt": torch.tensor([prompt for prompt, _ in flat]),
    }


@contextmanager
def _placed(walker: Walker) -> Iterator[None]:
    """The networks on the walker's device, in full float32 there, and back where they were."""
    encoders = (part for name, part in walker.pipe.components.items() if name.startswith("text_encoder"))
    modules = (walker.teacher, *(encoder for encoder in encoders if encoder is not None))
    before = walker.teacher.network.device
    try:
        for module in modules:
            module.to(walker.device)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        for module in modules:
            module.to(before)
