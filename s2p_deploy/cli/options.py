"""Options that several commands share, and what their text stands for."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from s2p_deploy.api import new_folder
from s2p_deploy.cli.output import progress_bars
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s2p_deploy.calib.dataset import Estimate
    from s2p_deploy.calib.target import SearchTime
    from s2p_deploy.calib.training_memory import Fit, TrainingTime
    from s2p_deploy.pipeline import Schedule

_COMMON, _READING = "Common options", "How the model is read"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON object on stdout.", rich_help_panel=_COMMON)
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace an artifact at --out, once the new one is complete.", rich_help_panel=_COMMON
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto (a CUDA device where there is one), cpu, cuda or cuda:N.",
        rich_help_panel=_COMMON,
    ),
]
ReferenceDeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the references compute: auto (on the engine's own device), cpu, cuda or cuda:N.",
        rich_help_panel=_COMMON,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads; PyTorch's default if omitted.", rich_help_panel=_COMMON),
]
BackendOption = Annotated[
    str,
    typer.Option("--backend", metavar="NAME", help="onnxruntime, openvino, tensorrt_rtx or tensorrt."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", metavar="TYPE", help="What is not integer is computed in: f32, or bf16 (OpenVINO)."),
]
ProviderOption = Annotated[
    str | None,
    typer.Option(
        "--provider", metavar="NAME", help="ONNX Runtime's execution provider: cpu, cuda, tensorrt or nv_tensorrt_rtx."
    ),
]
OptimizationOption = Annotated[
    str | None,
    typer.Option("--optimization", metavar="LEVEL", help="ONNX Runtime's: reference (the graph as it is) or full."),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder in diffusers format, a .safetensors file, a hub id (owner/name), or shapes (bundled).",
    ),
]
FileComponentsOption = Annotated[
    str | None,
    typer.Option(
        "--components",
        metavar="MODEL",
        help="For a single file: the diffusers folder or hub id of its configurations, and of the networks it lacks.",
        rich_help_panel=_READING,
    ),
]
VaeOption = Annotated[
    str | None,
    typer.Option("--vae", metavar="FILE|DIR", help="Another autoencoder than the model's.", rich_help_panel=_READING),
]
PredictionTypeOption = Annotated[
    Literal["epsilon", "v_prediction"] | None,
    typer.Option(
        "--prediction-type", help="What the denoiser predicts, where no file says so.", rich_help_panel=_READING
    ),
]
VariantOption = Annotated[
    str | None,
    typer.Option("--variant", metavar="NAME", help="Variant of the weights, such as fp16.", rich_help_panel=_READING),
]
EmaOption = Annotated[
    bool, typer.Option("--ema", help="Take a single file's averaged weights (EMA).", rich_help_panel=_READING)
]
ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that another command wrote.")]
EngineArgument = Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine: the folder that build wrote.")]
OutFolder = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder of the artifact to write.", callback=new_folder)
]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", metavar="RECIPE", help="A recipe's name (w4a8, w8a8, fp, ...) or a YAML file."),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="A LoRA to fuse into the weights, e.g. ink.safetensors:0.8; repeatable.",
    ),
]
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
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a value of the recipe, e.g. training.iterations=20; repeatable."
    ),
]
SchedulesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--schedule", metavar="NAME:STEPS", help="Another schedule to use the engine on, e.g. unipc:10; repeatable."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The floating-point pipeline, if it was moved since calibration.",
        rich_help_panel=_COMMON,
    ),
]
PublicKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--public-key",
        metavar="FILE.pem",
        envvar="S2P_PUBLIC_KEY",
        help="Refuse artifacts that were not signed with the private half of this key.",
        rich_help_panel=_COMMON,
    ),
]


def overrides_from_settings(settings: list[str] | None) -> dict[str, Any]:
    """Nests recipe values from ``["training.iterations=20", ...]``; values are read as YAML.

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
    """Parses ``NAME:STEPS`` to a schedule.

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


def bytes_from_option(text: str) -> int:
    """Parses a size such as ``8G``, ``1.5 GB`` or ``512MiB`` to bytes. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([kmgt]i?)?b?", text.strip().lower(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise InputError(f"--memory-limit {text!r} must be a size above 0, e.g. 8G or 512MiB")
    return size


def writable_file(file: Path | None) -> Path | None:
    """Checks a file to write before any work: the callback of an option. Raises InputError as :func:`check_file`."""
    if file is not None:
        from s2p_deploy.records.files import check_file

        check_file(file)
    return file


@contextmanager
def context_from_options(
    device: str = "auto", threads: int | None = None, seed: int | None = None
) -> Iterator[Context]:
    """Yields the context that a command's options describe, with progress shown on stderr until it is left.

    Raises:
        InputError: there is no device of that name. MissingEnvironmentError: it is not on this machine.
    """
    with progress_bars() as progress:
        context = Context(device=device, threads=threads, progress=progress)
        if device != "auto":
            _ = context.torch_device  # a wrong name is refused before anything is read
        yield context


def print_estimate(estimate: Estimate | Fit | TrainingTime | SearchTime) -> None:
    """Prints one line on stderr before the work: what a dataset takes, a training's memory where counted, its time."""
    sys.stderr.write(f"{estimate.stage}: {estimate}\n")
