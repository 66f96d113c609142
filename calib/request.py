"""A calibration's request, the folder of its unfinished work, and the check that a finished model is the requested one.

A second start continues the same request only.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replaced
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy import __version__
from s2p_deploy.calib.fused_pipeline import fused_loras
from s2p_deploy.calib.pictures import drawn_by
from s2p_deploy.errors import InputError
from s2p_deploy.records import CalibratedModel, check_vacant, read_manifest
from s2p_deploy.records.files import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from s2p_deploy.calib.hooks import Hooks
    from s2p_deploy.context import Context
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.metric_networks import MetricWeights
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PrecisionPlan, PromptSet

KIND = "CalibratedModel"
_REQUEST = "request.json"


@dataclass(frozen=True)
class CalibrationRequest:
    """A calibration to make; the recipe is resolved.

    ``prompts`` are walked for the dataset; ``selection`` are the prompts after them, whose trajectories choose the
    checkpoint; ``judged`` those after, whose pictures rank layers and decide a target. ``plan`` replaces the recipe's
    rules; ``initial`` is a finished model to continue. ``dataset`` is the folder of the dataset; None keeps it inside
    the model. ``weights`` are of the metrics of a target that need some. ``control`` has the digests of a ControlNet
    that is calibrated in the denoiser's place, and of the pictures that it reads.
    """

    base: BasePipeline
    recipe: Recipe
    prompts: PromptSet
    selection: PromptSet
    judged: PromptSet
    out: Path
    plan: PrecisionPlan | None
    initial: CalibratedModel | None
    dataset: Path | None
    replace: bool
    hooks: Hooks
    context: Context
    weights: MetricWeights | None = None
    control: Mapping[str, Any] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """Folder of unfinished work."""
        return partial_of(self.out, self.context.work)

    def identity(self) -> dict[str, Any]:
        """Names what decides the result, whichever machine it is made on."""
        loras = fused_loras(self.base)
        return ({"fused LoRAs": loras} if loras else {}) | {
            **self.control,
            "recipe": self.recipe.model_dump(mode="json"),
            "pipeline": self.base.base.digest,
            "prompts": self.prompts.digest,
            "selection prompts": self.selection.digest,
            "judged prompts": self.judged.digest,
            "initial model": None if self.initial is None else self.initial.manifest.digest,
            "plan": None if self.plan is None else json.loads(json.dumps(asdict(self.plan))),
            "hooks": self.hooks.replaced(),
            **drawn_by(self.recipe),
            "weights of metrics": None if self.weights is None else self.weights.digests,
        }

    def conditions(self) -> dict[str, Any]:
        """Names everything that decides the bits of the result."""
        # What is asked of the result decides nothing of the work behind it: another target goes on with that.
        recipe = self.recipe.model_dump(mode="json", exclude={"validation"})
        recipe["target"] = {name: recipe["target"][name] for name in ("ranked", "searched", "verified")}
        return self.identity() | {
            "recipe": recipe,
            "device and number of threads": f"{self.context.torch_device}, {torch.get_num_threads()}",
            "arithmetic": self.context.arithmetic_name,
            "memory limit": self.context.memory_limit,
            "samples per call": self.context.samples_per_call,
            "version": f"{__version__}, torch {torch.__version__}",
        }


def check_out(request: CalibrationRequest) -> None:
    """Raises InputError where ``request.out`` can be no model of the request, new or finished; reads no model."""
    inputs: dict[str, Path | None] = {
        "pipeline": request.base.folder,
        "dataset": request.dataset,
        "initial model": None if request.initial is None else request.initial.folder,
    }
    given = {name: folder for name, folder in inputs.items() if folder is not None}
    check_vacant(request.out, KIND, replace=True, inputs=given)  # a finished one is opened, or replaced


def open_calibrated(request: CalibrationRequest) -> CalibratedModel:
    """Opens the finished model at ``request.out``.

    Raises:
        InputError: it is of another request. IntegrityError: it was changed.
    """
    manifest = read_manifest(request.out, KIND)
    identity = _chosen_alike(request, manifest.recipe).identity()
    present = manifest.content.get("request", {}) | {"recipe": manifest.recipe}
    other = [name for name in identity if present.get(name) != identity[name]]
    if other:
        raise InputError(
            f"{request.out} was made by another request (it differs in {' and '.join(other)}):"
            " choose another --out, or pass --force to replace it"
        )
    if stored_request(request.partial) == continued(request).conditions():
        shutil.rmtree(request.partial)  # killed between the last rename and the clearing away
    return CalibratedModel.open(request.out)


def continued(request: CalibrationRequest) -> CalibrationRequest:
    """Takes over from unfinished work what its start chose and the request leaves open.

    How the samples of an update are divided, and how many samples a call takes: both depend on the memory that was
    free then.
    """
    stored = stored_request(request.partial)
    alike = _chosen_alike(request, stored.get("recipe", {}))
    if alike.context.samples_per_call is None:
        alike = replaced(alike, context=replaced(alike.context, samples_per_call=stored.get("samples per call")))
    return alike


def _chosen_alike(request: CalibrationRequest, stored: Mapping[str, Any]) -> CalibrationRequest:
    """Divides the samples of an update as a stored recipe does, where the request's recipe leaves that open."""
    training, theirs = request.recipe.training, stored.get("training", {})
    division = {name: theirs.get(name) for name in ("batch", "accumulate", "checkpointing")}
    stated = training.model_fields_set & division.keys()
    if None in division.values() or any(division[name] != getattr(training, name) for name in stated):
        return request
    if division["batch"] * division["accumulate"] != training.batch * training.accumulate:
        return request
    return replaced(request, recipe=request.recipe.with_division(**division))


def partial_of(out: Path, work: Path | None = None) -> Path:
    """Names the folder of the unfinished work on ``out``: in ``work``, or beside ``out``."""
    return (out.parent if work is None else work) / f"{out.name}.partial"


def is_unfinished(folder: Path, request: dict[str, Any], *, replace: bool) -> bool:
    """Tells whether a work folder holds unfinished work of a request of JSON values.

    Raises:
        InputError: it is of another request, and ``replace`` is not set.
    """
    stored = stored_request(folder)
    if stored and stored != request and not replace:
        other = next((name for name in request if stored.get(name) != request[name]), "version")
        raise InputError(
            f"{folder} holds unfinished work with another {other}:"
            " start it as it was, choose another --out, or pass --force to drop it"
        )
    return bool(stored) and stored == request


def claim_unfinished(folder: Path, request: dict[str, Any], *, replace: bool) -> None:
    """Makes the work folder of a request, or takes over the one left behind.

    Raises:
        InputError: as :func:`is_unfinished` and :func:`check_work`.
    """
    if is_unfinished(folder, request, replace=replace):
        return
    check_work(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_text(folder / _REQUEST, json.dumps(request, indent=1) + "\n")


def check_work(folder: Path) -> None:
    """Raises InputError where a work folder holds files and no request, so that no stage of this package made it."""
    if not os.path.lexists(folder) or (folder / _REQUEST).is_file():
        return
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"{folder} is needed for unfinished work and is none: move it away, or choose another --out")


def stored_request(folder: Path) -> dict[str, Any]:
    """Reads the request of a work folder; empty where there is none."""
    file = folder / _REQUEST
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return stored
