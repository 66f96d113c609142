"""The shards of all ranks to one LatentDataset, whose bytes do not tell how many ranks there were."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from s2p_deploy.calib.dataset.shards import KIND, open_finished, ranks_at_work, stored_request
from s2p_deploy.errors import InputError
from s2p_deploy.records import LatentDataset, write_artifact
from s2p_deploy.records.lock import claimed
from s2p_deploy.records.whole_files import link_or_copy

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.calib.dataset.shards import DatasetRequest


def merge_shards(request: DatasetRequest) -> LatentDataset:
    """Writes the dataset from its work folder and clears that away, or opens it where it is whole.

    Raises:
        InputError: shards are missing, a rank is still at work, or the folder is of another request.
        IntegrityError: the finished dataset was changed.
    """
    finished = open_finished(request)
    if finished is not None:
        return finished
    stored = _stored(request)
    with claimed(request.work / "merge"):
        _check_complete(request)

        def fill(folder: Path) -> dict[str, Any]:
            for path in (request.texts, *(shard.path for shard in request.shards)):
                link_or_copy(path, folder / path.name)
            return _content(request, stored)

        write_artifact(
            request.out, kind=KIND, base=request.base, recipe=request.sections, fill=fill, replace=request.replace
        )
    shutil.rmtree(request.work, ignore_errors=True)
    return LatentDataset.open(request.out)


def _stored(request: DatasetRequest) -> dict[str, Any]:
    """What the work folder says of its walk, which is the request's."""
    stored, asked = stored_request(request.work), request.asked()
    if not stored:
        raise InputError(f"{request.work} holds no shards: run the ranks first, with the same --out")
    other = next((name for name in asked if stored[name] != asked[name]), None)
    if other is not None:
        raise InputError(f"{request.work} holds an unfinished dataset with another {other}: merge it as it was started")
    return stored


def _check_complete(request: DatasetRequest) -> None:
    busy = ranks_at_work(request)
    if busy:
        raise InputError(f"{', '.join(busy)} of {request.work} is still at work: merge when it is done")
    missing = [str(shard.number) for shard in request.shards if not shard.path.exists()]
    if missing:
        named = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise InputError(
            f"{request.work} lacks {len(missing)} of {len(request.shards)} shards ({named}):"
            " run the ranks that make them, then merge"
        )


def _content(request: DatasetRequest, stored: dict[str, Any]) -> dict[str, Any]:
    recipe = request.recipe
    return {
        "prompts": request.prompts.digest,
        "points": sum(_points(shard.path) for shard in request.shards),
        "width": recipe.dataset.width,
        "threads": stored["threads"],
        "dtype": stored["dtype"],
        "device": stored["device"],
        "sampling": {
            "scheduler": stored["scheduler"],
            "steps": recipe.sampling.steps,
            "guidance_scale": recipe.sampling.guidance_scale,
        },
    }


def _points(shard: Path) -> int:
    with safe_open(shard, "numpy") as opened:
        return int(opened.get_slice("rows").get_shape()[0])
