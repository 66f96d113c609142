"""The application: its commands by panel, its global options, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from s2p_deploy import __version__
from s2p_deploy.cli.adapt import adapt
from s2p_deploy.cli.bench import bench
from s2p_deploy.cli.build import build
from s2p_deploy.cli.calibrate import calibrate
from s2p_deploy.cli.compare import compare
from s2p_deploy.cli.components import components
from s2p_deploy.cli.dataset import dataset
from s2p_deploy.cli.demo import demo
from s2p_deploy.cli.doctor import doctor
from s2p_deploy.cli.export import export
from s2p_deploy.cli.export_triton import export_triton
from s2p_deploy.cli.generate import generate
from s2p_deploy.cli.inspect import inspect
from s2p_deploy.cli.join import join
from s2p_deploy.cli.output import show_error
from s2p_deploy.cli.serve import serve
from s2p_deploy.cli.sign import sign, verify
from s2p_deploy.cli.validate import validate
from s2p_deploy.errors import S2PError

_INTERRUPTED = 130
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRONG_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,  # of a folder in which nothing can be made, or that went while the command ran
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}

# Libraries read these when they are imported: no chatter, no download bars, no spinning.
_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",  # for child processes
    # OpenMP threads that wait for a core spin by default: on a busy machine that made a small UNet 30 times slower, and
    # sleeping costs a tenth on an idle one.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_LOGGERS = (
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "huggingface_hub",
    "accelerate",
    "onnxscript",
    "onnx_ir",
)

app = typer.Typer(
    name="s2p-deploy",
    help="Stable Diffusion as INT8/INT4 engines that draw the same pictures as the floating-point model.",
    epilog="""\
First run, on the bundled pipeline: s2p-deploy demo --out build/demo

Your own model: calibrate MODEL, export, build, validate, generate. Every COMMAND has its own --help with examples.""",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
PANELS = {
    "Pipeline stages": (dataset, calibrate, adapt, export, build, join, validate),
    "Use an engine": (generate, serve, export_triton, components),
    "Inspect and trust": (inspect, verify, sign, bench, compare),
    "Environment": (doctor, demo),
}
EXAMPLES = {
    dataset: "s2p-deploy dataset shapes --recipe w4a8 --prompts shapes:train --out build/dataset",
    calibrate: "s2p-deploy calibrate shapes --recipe w4a8 --prompts shapes:train --out build/calib",
    adapt: "s2p-deploy adapt build/calib --lora ink.safetensors:0.8 --out build/calib-ink",
    export: "s2p-deploy export build/calib --out build/graph",
    build: "s2p-deploy build build/graph --backend openvino --out build/engine",
    join: "s2p-deploy join build/engine --low-noise build/fp/engine --out build/joined",
    validate: "s2p-deploy validate build/engine --prompts shapes:held_out --out build/report",
    generate: 's2p-deploy generate build/engine --prompt "a small red circle" --out circle.png',
    serve: "s2p-deploy serve build/engine --port 8000",
    export_triton: "s2p-deploy export-triton build/engine --out build/repository",
    components: "s2p-deploy components shapes --backend openvino --out build/components",
    inspect: "s2p-deploy inspect build/engine",
    verify: "s2p-deploy verify build/engine --public-key team.pub.pem",
    sign: "s2p-deploy sign build/engine --private-key team.pem",
    bench: "s2p-deploy bench build/engine --against build/fp/engine",
    compare: "s2p-deploy compare w8a8 w4a8 --model shapes --prompts shapes:train --held-out shapes:held_out --out DIR",
    doctor: "s2p-deploy doctor",
    demo: "s2p-deploy demo --out build/demo",
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel, epilog=f"Example: {EXAMPLES[command]}")(command)


def main(arguments: list[str] | None = None) -> int:
    """Runs ``s2p-deploy`` and returns its exit code."""
    return run_app(app, "s2p-deploy", arguments)


def run_app(commands: typer.Typer, program: str, arguments: list[str] | None = None) -> int:
    """Runs the commands of ``program`` and returns the exit code; errors become one line.

    0 ok, 1 internal or build crash, 2 usage, recipe or input data, 3 gate failed, 4 environment missing, 5 artifact
    integrity, 130 interrupt.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        result = commands(given, prog_name=program, standalone_mode=False)
        if result == _INTERRUPTED:  # typer turns KeyboardInterrupt into this
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        debug = "--debug" in given
        if debug:
            traceback.print_exc()
        code, message = _explain(error, program)
        advice = "" if debug or code != 1 or isinstance(error, S2PError) else f" ({program} --debug ... shows where)"
        return show_error(error, code, message + advice, as_json="--json" in given)
    return result if isinstance(result, int) else 0


def _explain(error: BaseException, program: str) -> tuple[int, str]:
    """Translates anything that a command can raise to an exit code and a message."""
    match error:
        case KeyboardInterrupt() | Abort():
            return _INTERRUPTED, "interrupted: start the same command again to go on"
        case TyperException():
            return error.exit_code, f"{error.format_message()} ({program} --help lists what there is)"
        case S2PError():
            return error.exit_code, str(error)
        case OSError() if error.errno in _NO_ROOM:
            place = f" at {error.filename}" if error.filename else ""
            return 2, f"the disk is full{place} ({error.strerror}): make room, or choose another --out"
        case OSError() if error.errno in _WRONG_PATH and error.filename:
            return 2, f"{error.filename} cannot be used ({error.strerror}): choose another path"
        case _:
            return 1, f"internal error: {type(error).__name__}: {error}"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"s2p-deploy {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries log.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Stable Diffusion as INT8/INT4 engines that draw the same pictures as the floating-point model."""
    if not debug:
        _quiet_libraries()


def _quiet_libraries() -> None:
    """Silences libraries that are imported from here on. A value that the user set in the environment stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
