"""An unfinished dataset's work folder: what was asked for, which shards are there, and who is at work in it."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from s2p_deploy.errors import InputError
from s2p_deploy.records import LatentDataset, read_manifest
from s2p_deploy.records.lock import claimed, is_claimed
from s2p_deploy.records.whole_files import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Base, PromptSet

KIND = "LatentDataset"
_REQUEST = "request.json"


@dataclass(frozen=True)
class Shard:
    """Some prompts' points in one file: where it exists, it is whole. ``prompts`` index the request's."""

    number: int
    prompts: range
    path: Path


@dataclass(frozen=True)
class DatasetRequest:
    """What a dataset is made from, and where to. The recipe is resolved; all ``prompts`` are walked.

    ``replace`` drops what stands in the way at ``out`` and in the work folder.
    """

    base: Base
    prompts: PromptSet
    recipe: Recipe
    out: Path
    replace: bool = False

    @property
    def work(self) -> Path:
        """Where unfinished work stands."""
        return self.out.with_name(f"{self.out.name}.shards")

    @property
    def texts(self) -> Path:
        """The prompts' text states."""
        return self.work / "texts.safetensors"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards of the dataset, in the order of the prompts."""
        total, size = len(self.prompts.prompts), self.recipe.dataset.prompts_per_shard
        starts = enumerate(range(0, total, size))
        return tuple(
            Shard(number, range(start, min(start + size, total)), self.work / f"shard-{number:05d}.safetensors")
            for number, start in starts
        )

    @property
    def sections(self) -> dict[str, Any]:
        """The parts of the recipe that decide a dataset: recipes that agree in them can share one."""
        return {name: getattr(self.recipe, name).model_dump(mode="json") for name in ("sampling", "dataset")}

    def asked(self) -> dict[str, Any]:
        """Which points are asked for. How exactly they are rounded depends on the conditions of the walk too."""
        return {"recipe": self.sections, "prompts": self.prompts.digest, "pipeline": self.base.digest}


def dataset_request(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, out: Path, *, replace: bool = False
) -> DatasetRequest:
    """The request for the dataset of ``recipe``: the prompts that it walks; the pipeline's guidance where left open."""
    resolved = recipe.with_guidance(base.default_guidance)
    return DatasetRequest(base.base, prompts.first(recipe.dataset.prompts), resolved, out, replace)


def open_finished(request: DatasetRequest) -> LatentDataset | None:
    """The dataset, where it is whole already. What was left behind by a kill after the last rename is cleared away.

    Raises:
        InputError: another dataset stands there.
        IntegrityError: it was changed.
    """
    if request.replace or not request.out.exists():
        return None
    manifest = read_manifest(request.out, KIND)
    found = {"recipe": manifest.recipe, "prompts": manifest.content["prompts"], "pipeline": manifest.base.digest}
    other = _difference(found, request.asked())
    if other:
        raise InputError(
            f"{request.out} was made from another {other}: choose another --out, or pass --force to replace it"
        )
    dataset = LatentDataset.open(request.out)
    if not _difference(stored_request(request.work), request.asked()):
        shutil.rmtree(request.work, ignore_errors=True)
    return dataset


def stored_request(work: Path) -> dict[str, Any]:
    """What the work folder is for, and the conditions of its walk; empty where there is none."""
    file = work / _REQUEST
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def claim_work(request: DatasetRequest, conditions: dict[str, Any]) -> None:
    """Makes the work folder of a request, or finds the one that was left behind; ranks may come at the same time.

    ``conditions``: what else decides the bits. Raises InputError where the folder is of another request.
    """
    wanted = request.asked() | conditions
    with FileLock(request.work / ".request.lock"):
        found = stored_request(request.work)
        if found == wanted:
            return
        if found and not request.replace:
            raise InputError(
                f"{request.work} holds an unfinished dataset with another {_difference(found, wanted)}:"
                " start it as it was, choose another --out, or pass --force to drop it"
            )
        for path in request.work.iterdir():
            if path.suffix != ".lock":
                path.unlink()
        write_text(request.work / _REQUEST, json.dumps(wanted, indent=1) + "\n")


def missing_shards(request: DatasetRequest, conditions: dict[str, Any]) -> list[Shard]:
    """The shards that are not there yet: all of them, where the work folder is of another request."""
    ours = stored_request(request.work) == request.asked() | conditions
    return [shard for shard in request.shards if not (ours and shard.path.exists())]


@contextmanager
def claimed_rank(request: DatasetRequest, rank: int, ranks: int) -> Iterator[None]:
    """Holds the shards of one of ``ranks`` processes.

    Raises:
        InputError: another process has them, alone or as one of another number of ranks.
    """
    with claimed(request.work / f"rank-{rank}-of-{ranks}"):
        for name in ranks_at_work(request):
            if not name.endswith(f"-of-{ranks}"):
                raise InputError(
                    f"another process is at work in {request.work} as {name}: let it finish, or choose another --out"
                )
        yield


def ranks_at_work(request: DatasetRequest) -> list[str]:
    """Names of the ranks that are writing shards now, e.g. ``rank-0-of-2``."""
    names = sorted(path.name[1 : -len(".lock")] for path in request.work.glob(".rank-*.lock"))
    return [name for name in names if is_claimed(request.work / name)]


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first name whose value is another one; empty where all agree."""
    return next((name for name in wanted if found.get(name) != wanted[name]), "")
