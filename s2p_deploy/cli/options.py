"""Options that several commands share, and what their text means."""

from __future__ import annotations

import os
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.errors import InputError, MissingEnvironmentError

if TYPE_CHECKING:
    import torch

    from s2p_deploy.calib.dataset.estimate import Estimate
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.pipeline import Schedule
    from s2p_deploy.records import Manifest, PromptSet

JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what stands at --out, once the new one is whole.")]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder in diffusers format, a hub id (owner/name), or shapes (bundled)."),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder of the artifact to write.")]
PromptsOption = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="One prompt per line, or JSON lines {id, text, negative}; shapes:train and shapes:held_out are bundled.",
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe, e.g. training.iterations=20."),
]
SchedulesOption = Annotated[
    list[str] | None,
    typer.Option("--schedule", metavar="NAME:STEPS", help="Draw on this schedule too, e.g. unipc:10 or pndm:25."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Where the floating-point pipeline is now, where it was moved.")
]

PublicKeyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.pem",
        envvar="S2P_PUBLIC_KEY",
        help="Refuse what was not signed with this key's private half (or S2P_PUBLIC_KEY).",
    ),
]

_BUNDLED = "shapes:"


def prompts_from_option(value: str) -> PromptSet:
    """The prompts of a file, or of ``shapes:NAME``, a prompt file that ships with the bundled pipeline.

    Raises:
        InputError: there is no such file, or it is no prompt file.
    """
    from s2p_deploy.records import read_prompts

    if not value.startswith(_BUNDLED):
        return read_prompts(Path(value))
    folder = Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline" / "prompts"))
    names = sorted(path.stem for path in folder.glob("*.jsonl"))
    name = value.removeprefix(_BUNDLED)
    if name not in names:
        known = ", ".join(_BUNDLED + known for known in names) or "none"
        raise InputError(f"there is no bundled prompt file {value!r}: there are {known}")
    return read_prompts(folder / f"{name}.jsonl")


def overrides_from_settings(settings: list[str] | None) -> dict[str, Any]:
    """Nested recipe values from ``["training.iterations=20", ...]``; values are read as YAML scalars or lists.

    Raises:
        InputError: a setting is not KEY=VALUE, its value is not YAML, or two settings contradict each other.
    """
    import yaml

    result: dict[str, Any] = {}
    for setting in settings or ():
        key, equals, text = setting.partition("=")
        *path, last = key.strip().split(".")
        if not equals or not all((*path, last)):
            raise InputError(f"--set {setting!r} must be KEY=VALUE, e.g. training.iterations=20")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {setting!r}: the value is not valid YAML") from error
        place = result
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {setting!r} contradicts an earlier --set of {part!r}")
        place[last] = value
    return result


def schedule_from_option(text: str) -> Schedule:
    """A schedule by ``NAME:STEPS``.

    Raises:
        InputError: there is no scheduler of that name, or no such number of steps.
    """
    from s2p_deploy.pipeline import Schedule
    from s2p_deploy.schedulers import scheduler_names

    name, _, steps = text.partition(":")
    if name not in scheduler_names() or not steps.isascii() or not steps.isdigit() or int(steps) < 1:
        known = ", ".join(scheduler_names())
        raise InputError(f"--schedule {text!r} must be NAME:STEPS, e.g. unipc:10, with a name of {known}")
    return Schedule(int(steps), name)


def device_from_option(name: str) -> torch.device:
    """A device by its option; ``auto`` is a GPU where there is one.

    Raises:
        InputError: there is no device of that name. MissingEnvironmentError: it is not on this machine.
    """
    import torch

    if name == "auto":
        forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}  # by accelerate launch --cpu
        return torch.device("cpu" if forced or not torch.cuda.is_available() else "cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r} is unknown: use auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise InputError(f"--device {name!r} is unknown: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingEnvironmentError(f"{name} is not there: use --device cpu, or install a CUDA build of torch")
    return device


def tell_estimate(estimate: Estimate) -> None:
    """One line on stderr, before a dataset is made."""
    sys.stderr.write(f"dataset: {estimate}\n")


def base_of(manifest: Manifest, given: str | None) -> BasePipeline:
    """The floating-point pipeline that an artifact was made from: where ``given`` says, or where it was.

    Raises:
        InputError: there is none. IntegrityError: it is another one, or was changed.
    """
    from s2p_deploy.families.base import base_of as found_base  # imports PyTorch

    return found_base(manifest, given)
