"""What a calibration was asked to do, and its claim on the folder where unfinished work stands."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy import __version__
from s2p_deploy.calib.unfinished import claim_unfinished, partial_of, request_of
from s2p_deploy.errors import InputError
from s2p_deploy.records import CalibratedModel, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PrecisionPlan, PromptSet

KIND = "CalibratedModel"


@dataclass(frozen=True)
class Job:
    """A calibration: the recipe is resolved, ``prompts`` are those that are walked.

    ``selection`` are the prompts after them, whose trajectories choose the checkpoint. ``plan`` stands in place of what
    the recipe's rules would give; ``initial`` is a finished model to go on from. ``dataset`` is where the dataset
    stands or is to be kept; None keeps it inside.
    """

    base: BasePipeline
    recipe: Recipe
    prompts: PromptSet
    selection: PromptSet
    out: Path
    plan: PrecisionPlan | None
    initial: CalibratedModel | None
    dataset: Path | None
    device: str
    replace: bool
    progress: Progress

    @property
    def partial(self) -> Path:
        """Where unfinished work stands."""
        return partial_of(self.out)

    def asked(self) -> dict[str, Any]:
        """What decides the result, whichever machine it is made on."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "pipeline": self.base.base.digest,
            "prompts": self.prompts.digest,
            "selection prompts": self.selection.digest,
            "initial": None if self.initial is None else self.initial.manifest.digest,
            "plan": None if self.plan is None else json.loads(json.dumps(asdict(self.plan))),
        }

    def request(self) -> dict[str, Any]:
        """Everything that decides the bits of the result."""
        return self.asked() | {
            "device and number of threads": f"{self.device}, {torch.get_num_threads()}",
            "version": f"{__version__}, torch {torch.__version__}",
        }


def finished(job: Job) -> CalibratedModel:
    """The model at ``job.out``, where it is what the job would make.

    Raises:
        InputError: it is of another job. IntegrityError: it was changed.
    """
    manifest = read_manifest(job.out, KIND)
    if manifest.content.get("asked") != {key: value for key, value in job.asked().items() if key != "recipe"} or (
        manifest.recipe != job.asked()["recipe"]
    ):
        raise InputError(
            f"{job.out} was made from another recipe, prompts, plan, initial model or pipeline:"
            " choose another --out, or pass --force to replace it"
        )
    if request_of(job.partial) == job.request():
        shutil.rmtree(job.partial)  # killed between the last rename and the clearing away
    return CalibratedModel.open(job.out)


def claim(job: Job) -> None:
    """Makes the work folder of a job, or finds the one that was left behind.

    Raises:
        InputError: what was left behind is of another job.
    """
    claim_unfinished(job.partial, job.request(), replace=job.replace)
