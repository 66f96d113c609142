"""Prompts to a LatentDataset: sharded, and continued after any kill with the shards that are missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from s2p_deploy.calib.atomic import link_or_copy, write_tensors
from s2p_deploy.calib.trajectories import Itinerary, StoredPoint, call_rows, choose_calls, walk
from s2p_deploy.progress import silent
from s2p_deploy.records import LatentDataset, write_artifact

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Base, PromptSet

TEXT_BATCH = 64
_TEXTS = "texts.safetensors"


@dataclass(frozen=True)
class TextStates:
    """``states`` float32 [m, tokens, D] of the distinct texts; ``cond`` and ``uncond`` int64 [prompts] index them."""

    states: Tensor
    cond: Tensor
    uncond: Tensor


def generate_dataset(  # noqa: PLR0913 - what a dataset is made from, and where to
    pipe: StableDiffusionPipeline,
    teacher: HotDenoiser,
    base: Base,
    prompts: PromptSet,
    recipe: Recipe,
    *,
    out: Path,
    progress: Progress = silent,
) -> LatentDataset:
    """Makes the dataset of all ``prompts`` by a resolved recipe at ``out``, or opens it where it is whole.

    Unfinished work stands beside it in ``<out>.shards``.

    Raises:
        InputError: the scheduler has fractional timesteps.
        IntegrityError: the dataset at ``out`` was changed.
    """
    if out.exists():
        return LatentDataset.open(out)
    work = out.with_name(f"{out.name}.shards")
    work.mkdir(parents=True, exist_ok=True)
    texts = _texts_once(pipe, prompts, work / _TEXTS)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(recipe.sampling.steps)
    calls = len(call_rows(scheduler))
    itineraries = [
        Itinerary(
            prompt,
            choose_calls(prompt, calls, recipe.dataset.points_per_prompt),
            texts.states[cond],
            texts.states[uncond],
        )
        for prompt, cond, uncond in zip(prompts.prompts, texts.cond.tolist(), texts.uncond.tolist(), strict=True)
    ]
    shards = _Shards(work, len(itineraries), recipe.dataset.prompts_per_shard)
    _walk_missing(teacher, scheduler, itineraries, shards, recipe, progress)

    def fill(folder: Path) -> dict[str, Any]:
        for path in (work / _TEXTS, *shards.paths):
            link_or_copy(path, folder / path.name)
        return _content(prompts, recipe, scheduler, sum(len(i.calls) for i in itineraries))

    write_artifact(out, kind="LatentDataset", base=base, recipe=recipe.model_dump(mode="json"), fill=fill)
    return LatentDataset.open(out)


def encode_texts(pipe: StableDiffusionPipeline, prompts: PromptSet) -> TextStates:
    """Text states of prompts and negative prompts by the pipeline's own text encoder, each distinct text once."""
    texts = list(dict.fromkeys(text for prompt in prompts.prompts for text in (prompt.text, prompt.negative)))
    batches = [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]
    with torch.no_grad():
        encoded = [pipe.encode_prompt(batch, pipe.device, 1, do_classifier_free_guidance=False)[0] for batch in batches]
    place = {text: index for index, text in enumerate(texts)}
    cond = torch.tensor([place[prompt.text] for prompt in prompts.prompts])
    uncond = torch.tensor([place[prompt.negative] for prompt in prompts.prompts])
    return TextStates(torch.cat(encoded).float(), cond, uncond)


class _Shards:
    """Files of ``size`` prompts each: a file that exists is whole."""

    def __init__(self, folder: Path, prompts: int, size: int) -> None:
        self.members = [range(start, min(start + size, prompts)) for start in range(0, prompts, size)]
        self.paths = [folder / f"shard-{number:05d}.safetensors" for number in range(len(self.members))]
        self.size = size
        self.waiting: dict[int, list[StoredPoint]] = {}

    def done(self) -> set[int]:
        """Prompts whose shard is on disk."""
        return {
            prompt
            for path, members in zip(self.paths, self.members, strict=True)
            if path.exists()
            for prompt in members
        }

    def add(self, prompt: int, points: list[StoredPoint]) -> None:
        """Takes a finished prompt and writes its shard once the last of its prompts is there."""
        self.waiting[prompt] = points
        number = prompt // self.size
        members = self.members[number]
        if all(member in self.waiting for member in members):
            write_tensors(self.paths[number], _shard_tensors({member: self.waiting.pop(member) for member in members}))


def _shard_tensors(points: dict[int, list[StoredPoint]]) -> dict[str, Tensor]:
    flat = [(prompt, point) for prompt, stored in points.items() for point in stored]
    return {
        "latents": torch.stack([point.latents for _, point in flat]),
        "cond": torch.stack([point.cond for _, point in flat]),
        "uncond": torch.stack([point.uncond for _, point in flat]),
        "rows": torch.tensor([point.row for _, point in flat]),
        "prompt": torch.tensor([prompt for prompt, _ in flat]),
    }


def _walk_missing(
    teacher: HotDenoiser,
    scheduler: Any,  # noqa: ANN401 - diffusers' schedulers share no typed base
    itineraries: Sequence[Itinerary],
    shards: _Shards,
    recipe: Recipe,
    progress: Progress,
) -> None:
    guidance = recipe.sampling.guidance_scale
    assert guidance is not None, "the recipe is resolved"
    skip = shards.done()
    total = sum(itinerary.length for itinerary in itineraries)
    done = sum(itineraries[prompt].length for prompt in skip)
    progress("dataset", done, total)
    for prompt, points in walk(
        teacher, scheduler, itineraries, guidance_scale=guidance, width=recipe.dataset.width, skip=skip
    ):
        if points is not None:
            shards.add(prompt, points)
        done += 1
        progress("dataset", done, total)


def _texts_once(pipe: StableDiffusionPipeline, prompts: PromptSet, path: Path) -> TextStates:
    if not path.exists():
        texts = encode_texts(pipe, prompts)
        write_tensors(path, {"texts": texts.states, "cond_text": texts.cond, "uncond_text": texts.uncond})
    stored = load_file(path)
    return TextStates(stored["texts"], stored["cond_text"], stored["uncond_text"])


def _content(prompts: PromptSet, recipe: Recipe, scheduler: Any, points: int) -> dict[str, Any]:  # noqa: ANN401 - as above
    return {
        "prompts": prompts.digest,
        "points": points,
        "width": recipe.dataset.width,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "device": "cpu",
        "sampling": {
            "scheduler": type(scheduler).__name__,
            "steps": recipe.sampling.steps,
            "guidance_scale": recipe.sampling.guidance_scale,
        },
    }
