"""Prompts to a LatentDataset: in shards, by any number of processes; after a kill, only what is missing is made.

Unfinished work is in ``<out>.shards``: the request, the prompts' text states, and one file per shard.
"""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file

from s2p_deploy import __version__
from s2p_deploy.calib.memory import memory_of, samples_that_fit
from s2p_deploy.calib.pictures import changed_pictures, check_pictures, drawn_by
from s2p_deploy.calib.request import check_work
from s2p_deploy.calib.trajectories import (
    FloatPipeline,
    PromptTexts,
    PromptWalk,
    call_with_zeros,
    encode_prompts,
    in_parts,
    load_float_pipeline,
    sampler_of,
    seconds_of_call,
    slot_queues,
    uniform_calls,
    walk_trajectories,
)
from s2p_deploy.context import Context, duration
from s2p_deploy.errors import InputError
from s2p_deploy.families import EncodedText, latent_shape, text_tokens
from s2p_deploy.families.layers import sample_shape_of
from s2p_deploy.families.model_family import has_branches
from s2p_deploy.records import LatentDataset, check_vacant, read_manifest, write_artifact
from s2p_deploy.records.files import check_room, claimed, is_claimed, link_or_copy, write_tensors, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.calib.trajectories import Sample
    from s2p_deploy.families import BasePipeline, IndexedDenoiser
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Prompt, PromptSet

KIND = "LatentDataset"
LOG = logging.getLogger(__name__)
_REQUEST = "request.json"
_LESS_ROOM = "make room, choose another --out, or lower dataset.prompts or dataset.samples_per_prompt"


@dataclass(frozen=True)
class Shard:
    """The samples of some prompts in one file, which is whole where it exists. ``prompts`` index the request's."""

    number: int
    prompts: range
    path: Path


@dataclass(frozen=True)
class DatasetRequest:
    """A dataset to make: of which pipeline, of all ``prompts``, by which (resolved) recipe, and where.

    ``rank`` of ``ranks`` processes make it together, each its own shards. ``replace`` drops what is at ``out`` and in
    the work folder. ``stored_calls`` chooses the calls of a prompt, as :func:`uniform_calls`.
    """

    base: BasePipeline
    prompts: PromptSet
    recipe: Recipe
    out: Path
    replace: bool = False
    rank: int = 0
    ranks: int = 1
    stored_calls: Callable[[Recipe, Prompt, int], tuple[int, ...]] = uniform_calls

    @property
    def work(self) -> Path:
        """Folder of unfinished work."""
        return self.out.with_name(f"{self.out.name}.shards")

    @property
    def texts(self) -> Path:
        """File of the prompts' text states."""
        return self.work / "texts.safetensors"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Lists all shards of the dataset, in the order of the prompts."""
        total, size = len(self.prompts.prompts), self.recipe.dataset.prompts_per_shard
        starts = enumerate(range(0, total, size))
        return tuple(
            Shard(number, range(start, min(start + size, total)), self.work / f"shard-{number:05d}.safetensors")
            for number, start in starts
        )

    @property
    def own_shards(self) -> tuple[Shard, ...]:
        """Lists the shards of this process."""
        return tuple(shard for shard in self.shards if shard.number % self.ranks == self.rank)

    @property
    def sections(self) -> dict[str, Any]:
        """Returns the sections of the recipe that decide a dataset: recipes that agree in them can share one."""
        return {name: getattr(self.recipe, name).model_dump(mode="json") for name in ("sampling", "dataset")}

    def identity(self) -> dict[str, Any]:
        """Names the samples. How exactly they are rounded depends on :func:`_conditions` too."""
        named = {"recipe": self.sections, "prompts": self.prompts.digest, "pipeline": self.base.base.digest}
        return named | drawn_by(self.recipe)


def dataset_request(  # noqa: PLR0913 - a dataset's source and place, and options by keyword
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    out: Path,
    *,
    replace: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> DatasetRequest:
    """Resolves the dataset of a recipe: the prompts that it walks, and the pipeline's guidance where left open."""
    resolved = recipe.with_sampling(base.default_guidance, base.default_strength)
    return DatasetRequest(base, prompts.first(recipe.dataset.prompts), resolved, out, replace, rank, ranks)


def generate_dataset(
    request: DatasetRequest,
    source: FloatPipeline | None = None,
    *,
    wait: Callable[[], object] = lambda: None,
    on_estimate: Callable[[Estimate], None] | None = None,
    context: Context = Context(),
) -> LatentDataset:
    """Makes the dataset of a request, or opens it where it is whole.

    With several ranks every process calls this, and rank 0 merges.

    Args:
        request: what to make.
        source: the pipeline of the request, where it is loaded already; its device is then where the dataset is made.
        wait: returns once all ranks have called it.
        on_estimate: called with size and time of what is missing, before it is made.
        context: where to compute, and whom to report to; bits depend on the number of threads.

    Raises:
        InputError: another dataset or another process's work is in the way, the disk has no room, or the pipeline's
            scheduler has no such schedule.
        IntegrityError: the dataset at ``out`` was changed.
    """
    context.set_threads()
    dataset = open_dataset(request)
    if dataset is not None:
        return dataset
    write_shards(request, source, on_estimate=on_estimate, context=context)
    wait()
    if request.rank == 0:
        merge_shards(request)
    wait()
    return LatentDataset.open(request.out)


def open_dataset(request: DatasetRequest) -> LatentDataset | None:
    """Opens the finished dataset, or returns None; clears work away that a kill left after the last rename.

    Raises:
        InputError: another dataset, or something else, is there.
        IntegrityError: it was changed.
    """
    check_vacant(request.out, KIND, replace=True, inputs={"pipeline": request.base.folder})
    if request.replace or not request.out.exists():
        return None
    manifest = read_manifest(request.out, KIND)
    present = {"recipe": manifest.recipe, "prompts": manifest.content["prompts"], "pipeline": manifest.base.digest}
    other = _difference(present, request.identity())
    if other:
        raise InputError(
            f"{request.out} was made from another {other}: choose another --out, or pass --force to replace it"
        )
    dataset = LatentDataset.open(request.out)
    if not _difference(_stored_request(request.work), request.identity()):
        shutil.rmtree(request.work, ignore_errors=True)
    return dataset


def write_shards(
    request: DatasetRequest,
    source: FloatPipeline | None = None,
    *,
    on_estimate: Callable[[Estimate], None] | None = None,
    context: Context = Context(),
) -> None:
    """Makes the missing shards of the request's rank in its work folder. As :func:`generate_dataset`."""
    context.set_threads()
    sampling, given, asked = request.recipe.sampling, len(request.prompts.prompts), request.recipe.dataset.prompts
    if given < asked and request.rank == 0:
        LOG.warning(
            "%d prompts are given, the recipe asks for %d (dataset.prompts): the dataset is smaller", given, asked
        )
    check_pictures(request.base.pipeline_class, request.recipe)
    source = source or load_float_pipeline(
        request.base, sampling.steps, device=context.torch_device, strength=sampling.strength
    )
    tokens = text_tokens(source.pipe, sampling.max_sequence_length)
    sampler = sampler_of(source.pipe, source.timesteps, sampling.steps, sampling.strength)
    calls = len(sampler.indices)
    chosen = [request.stored_calls(request.recipe, prompt, calls) for prompt in request.prompts.prompts]
    samples_per_call = _samples_per_call(request, source, tokens, context)
    conditions = _conditions(source, context, samples_per_call)
    missing = [prompt for shard in _missing(request, conditions) for prompt in shard.prompts]
    size = _bytes(request, source.denoiser, tokens, sum(len(chosen[prompt]) for prompt in missing))
    check_room(request.work, size, _LESS_ROOM)
    with _claimed_rank(request), context.arithmetic():
        _claim_work(request, conditions)
        missing_shards = _missing(request, conditions)
        own = [shard for shard in request.own_shards if shard in missing_shards]
        # One shard's queues behind the other's: a slot that is done with one goes on with the next. What its neighbors
        # walk changes no bit of a slot's outputs, so neither does when its turn comes.
        queues: list[list[int]] = [[] for _ in range(request.recipe.dataset.width)]
        for shard in own:
            lengths = {prompt: chosen[prompt][-1] + 1 for prompt in shard.prompts}
            for queue, more in zip(queues, slot_queues(lengths, len(queues), shard.number), strict=True):
                queue.extend(more)
        if own and on_estimate is not None:
            on_estimate(_estimate(request, source.denoiser, tokens, queues, chosen, samples_per_call))
        texts = _texts_once(request, source)
        started = _pictures_once(request, source, samples_per_call)
        walks = [
            PromptWalk(
                prompt,
                stored,
                texts.distinct[cond],
                texts.distinct[uncond],
                **{name: value[number] for name, value in started.items()},
            )
            for number, (prompt, stored, cond, uncond) in enumerate(
                zip(request.prompts.prompts, chosen, texts.cond.tolist(), texts.uncond.tolist(), strict=True)
            )
        ]
        guidance = sampling.guidance_scale
        assert guidance is not None, "the recipe is resolved"
        total = sum(walks[prompt].length for shard in request.own_shards for prompt in shard.prompts)
        done = total - sum(walks[prompt].length for queue in queues for prompt in queue)
        context.progress("dataset", done, total)
        shard_of = {prompt: shard for shard in own for prompt in shard.prompts}
        arrived: dict[int, list[Sample]] = {}
        steps = walk_trajectories(
            source.denoiser, sampler, walks, queues, guidance_scale=guidance, samples_per_call=samples_per_call
        )
        for prompt, samples in steps:
            if samples is not None:
                arrived[prompt] = samples
                shard = shard_of[prompt]
                if all(member in arrived for member in shard.prompts):
                    tensors = _shard_tensors(
                        {member: arrived.pop(member) for member in shard.prompts}, guided=_is_guided(request)
                    )
                    write_tensors(shard.path, tensors)
            done += 1
            context.progress("dataset", done, total)


def merge_shards(request: DatasetRequest) -> LatentDataset:
    """Joins the shards of all ranks to one dataset and clears the work folder away, or opens the finished one.

    The bytes do not depend on the number of ranks.

    Raises:
        InputError: shards are missing, a rank is still at work, or the folder is of another request.
        IntegrityError: the finished dataset was changed.
    """
    finished = open_dataset(request)
    if finished is not None:
        return finished
    stored, identity = _stored_request(request.work), request.identity()
    if not stored:
        raise InputError(f"{request.work} holds no shards: run the ranks first, with the same --out")
    other = _difference(stored, identity)
    if other:
        raise InputError(f"{request.work} holds an unfinished dataset with another {other}: merge it as it was started")
    with claimed(request.work / "merge"):
        _check_complete(request)

        def fill(folder: Path) -> dict[str, Any]:
            for path in (request.texts, *(shard.path for shard in request.shards)):
                link_or_copy(path, folder / path.name)
            sampling = request.recipe.sampling
            return {
                "prompts": request.prompts.digest,
                "samples": sum(_sample_count(shard.path) for shard in request.shards),
                "width": request.recipe.dataset.width,
                "threads": stored["threads"],
                "dtype": stored["dtype"],
                "device": stored["device"],
                "samples_per_call": stored["samples per call"],
                "sampling": {
                    "scheduler": stored["scheduler"],
                    "steps": sampling.steps,
                    "guidance_scale": sampling.guidance_scale,
                    "guided": _is_guided(request),
                },
            }

        write_artifact(
            request.out, kind=KIND, base=request.base.base, recipe=request.sections, fill=fill, replace=request.replace
        )
    shutil.rmtree(request.work, ignore_errors=True)
    return LatentDataset.open(request.out)


@dataclass(frozen=True)
class Estimate:
    """Work left to one process: ``samples`` of ``bytes`` in all, for ``calls`` of the denoiser at ``batch``."""

    samples: int
    bytes: int
    calls: int
    batch: int
    seconds: float
    stage: ClassVar[str] = "dataset"

    def __str__(self) -> str:
        return (
            f"{self.samples} samples, {self.bytes / 1e6:.3g} MB on disk;"
            f" {self.calls} denoiser calls at batch {self.batch}, about {duration(self.seconds)}"
        )


def _estimate(
    request: DatasetRequest,
    denoiser: IndexedDenoiser,
    tokens: int,
    queues: Sequence[Sequence[int]],
    chosen: Sequence[tuple[int, ...]],
    samples_per_call: int | None,
) -> Estimate:
    calls = max(sum(chosen[prompt][-1] + 1 for prompt in queue) for queue in queues)
    branches = 2 if _is_guided(request) else 1
    batch = branches * request.recipe.dataset.width
    count = sum(len(chosen[prompt]) for queue in queues for prompt in queue)
    size = _bytes(request, denoiser, tokens, count)
    seconds = calls * seconds_of_call(denoiser, tokens, batch, samples_per_call)
    return Estimate(count, size, calls, batch, seconds)


def _is_guided(request: DatasetRequest) -> bool:
    guidance = request.recipe.sampling.guidance_scale
    assert guidance is not None, "the recipe is resolved"
    return has_branches(request.base.denoiser_config(), guidance)


def _bytes(request: DatasetRequest, denoiser: IndexedDenoiser, tokens: int, samples: int) -> int:
    """Bytes on the disk of so many samples, and of the texts where they are not there yet."""
    texts = 0 if request.texts.exists() else text_bytes(request.prompts, denoiser, tokens)
    return samples * sample_bytes(denoiser, guided=_is_guided(request)) + texts


def sample_bytes(denoiser: IndexedDenoiser, *, guided: bool = True) -> int:
    """Bytes of one sample: input and both outputs in float16, timestep index and prompt in int64."""
    channels, height, width = latent_shape(denoiser)
    planes = sample_shape_of(denoiser.config)[0] + (2 if guided else 1) * channels
    return 2 * planes * height * width + 2 * 8


def text_bytes(prompts: PromptSet, denoiser: IndexedDenoiser, tokens: int) -> int:
    """Bytes of the texts: distinct states in float16 and added conditions in float32, two int64 indices per prompt."""
    texts = len({prompt.text for prompt in prompts.prompts}) + len({prompt.negative for prompt in prompts.prompts})
    each = 2 * tokens * denoiser.family.text_width(denoiser.config) + 4 * denoiser.added_width
    return texts * each + 2 * 8 * len(prompts.prompts)


def _samples_per_call(request: DatasetRequest, source: FloatPipeline, tokens: int, context: Context) -> int | None:
    """Decides how many samples a call takes: as given, as in the work folder, or as fit on a GPU; None: all."""
    memory, stored = memory_of(source.device), _stored_request(request.work).get("samples per call")
    if context.samples_per_call is not None or memory is None:
        return context.samples_per_call
    if stored is not None:
        return int(stored)
    return samples_that_fit(lambda samples: call_with_zeros(source.denoiser, tokens, samples), memory)


def _conditions(source: FloatPipeline, context: Context, samples_per_call: int | None) -> dict[str, Any]:
    """Returns what decides the bits of the samples, besides the request."""
    device = source.device
    name = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    return {
        "scheduler": type(source.pipe.scheduler).__name__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "texts": "float16",
        "arithmetic": context.arithmetic_name,
        "samples per call": samples_per_call,
        "device": name,
        "version": f"{__version__}, torch {torch.__version__}",
    }


def _texts_once(request: DatasetRequest, source: FloatPipeline) -> PromptTexts:
    """Encodes the texts in the process that comes first; the others wait, and all read the file."""
    path = request.texts
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            sampling = request.recipe.sampling
            made = encode_prompts(
                source.pipe, request.prompts, sampling.max_sequence_length, source.device, sampling.guidance_scale
            )
            states = made.distinct.states.half()
            if not states.isfinite().all():
                raise InputError(
                    f"{request.base.folder}: a text encoder's states are not finite in float16, though its weights are:"
                    " it overflows"
                )
            named = {"texts": states, "added_cond": made.distinct.added_cond}
            write_tensors(path, named | {"cond_text": made.cond, "uncond_text": made.uncond})
    stored = load_file(path)  # maps the file; the walk makes float32 of what it takes
    return PromptTexts(EncodedText(stored["texts"], stored["added_cond"]), stored["cond_text"], stored["uncond_text"])


def _pictures_once(request: DatasetRequest, source: FloatPipeline, samples_per_call: int | None) -> dict[str, Tensor]:
    """Makes what walks start from besides noise, as :func:`_texts_once`; empty where that is nothing."""
    if request.base.task == "text-to-image":
        return {}
    path = request.work / "pictures.safetensors"
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            denoise = in_parts(source.denoiser, samples_per_call)
            write_tensors(path, changed_pictures(source, denoise, request.prompts, request.recipe))
    return load_file(path)


def _shard_tensors(samples: dict[int, list[Sample]], *, guided: bool) -> dict[str, Tensor]:
    """Stacks samples; both outputs are stored where they differ."""
    flat = [(prompt, sample) for prompt, stored in samples.items() for sample in stored]
    outputs = {"uncond": torch.stack([sample.uncond for _, sample in flat])} if guided else {}
    return outputs | {
        "latents": torch.stack([sample.latents for _, sample in flat]),
        "cond": torch.stack([sample.cond for _, sample in flat]),
        "timestep_indices": torch.tensor([sample.timestep_index for _, sample in flat]),
        "prompt": torch.tensor([prompt for prompt, _ in flat]),
    }


def _sample_count(shard: Path) -> int:
    with safe_open(shard, "numpy") as opened:
        return int(opened.get_slice("prompt").get_shape()[0])


# The work folder


def _stored_request(work: Path) -> dict[str, Any]:
    """Reads the identity and the conditions of a work folder; empty where there is none."""
    file = work / _REQUEST
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return stored


def _claim_work(request: DatasetRequest, conditions: dict[str, Any]) -> None:
    """Makes the work folder of a request, or takes over the one left behind; ranks may come at the same time.

    Raises:
        InputError: the folder is of another request, or no work folder.
    """
    wanted = request.identity() | conditions
    with FileLock(request.work / ".request.lock"):
        stored = _stored_request(request.work)
        if stored == wanted:
            return
        if stored and not request.replace:
            raise InputError(
                f"{request.work} holds an unfinished dataset with another {_difference(stored, wanted)}:"
                " start it as it was, choose another --out, or pass --force to drop it"
            )
        check_work(request.work)
        for path in request.work.iterdir():
            if path.suffix != ".lock" and path.name != _REQUEST:  # kept to the last: it tells whose files these are
                path.unlink()
        write_text(request.work / _REQUEST, json.dumps(wanted, indent=1) + "\n")


def _missing(request: DatasetRequest, conditions: dict[str, Any]) -> list[Shard]:
    """Lists the shards that are not there yet: all of them, where the work folder is of another request."""
    ours = _stored_request(request.work) == request.identity() | conditions
    return [shard for shard in request.shards if not (ours and shard.path.exists())]


def _check_complete(request: DatasetRequest) -> None:
    busy = _ranks_at_work(request)
    if busy:
        raise InputError(f"{', '.join(busy)} of {request.work} is still at work: merge when it is done")
    missing = [str(shard.number) for shard in request.shards if not shard.path.exists()]
    if missing:
        named = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise InputError(
            f"{request.work} lacks {len(missing)} of {len(request.shards)} shards ({named}):"
            " run the ranks that make them, then merge"
        )


@contextmanager
def _claimed_rank(request: DatasetRequest) -> Iterator[None]:
    """Holds the shards of the request's rank.

    Raises:
        InputError: another process has them, alone or as one of another number of ranks.
    """
    with claimed(request.work / f"rank-{request.rank}-of-{request.ranks}"):
        for name in _ranks_at_work(request):
            if not name.endswith(f"-of-{request.ranks}"):
                raise InputError(
                    f"another process is at work in {request.work} as {name}: let it finish, or choose another --out"
                )
        yield


def _ranks_at_work(request: DatasetRequest) -> list[str]:
    """Names the ranks that are writing shards now, e.g. ``rank-0-of-2``."""
    names = sorted(path.name[1 : -len(".lock")] for path in request.work.glob(".rank-*.lock"))
    return [name for name in names if is_claimed(request.work / name)]


def _difference(present: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Names the first entry that differs; empty where all agree."""
    return next((name for name in wanted if present.get(name) != wanted[name]), "")
