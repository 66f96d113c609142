"""The application: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from s2p_deploy import __version__
from s2p_deploy.cli.bench import bench
from s2p_deploy.cli.build import build
from s2p_deploy.cli.calibrate import calibrate
from s2p_deploy.cli.compare import compare
from s2p_deploy.cli.dataset import dataset
from s2p_deploy.cli.demo import demo
from s2p_deploy.cli.doctor import doctor
from s2p_deploy.cli.export import export
from s2p_deploy.cli.export_triton import export_triton
from s2p_deploy.cli.generate import generate
from s2p_deploy.cli.inspect import inspect
from s2p_deploy.cli.outcome import show_error
from s2p_deploy.cli.parts import parts
from s2p_deploy.cli.quiet import quiet_libraries
from s2p_deploy.cli.serve import serve
from s2p_deploy.cli.sign import sign
from s2p_deploy.cli.validate import validate
from s2p_deploy.cli.verify import verify
from s2p_deploy.errors import S2PError

_INTERRUPTED = 130
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

app = typer.Typer(
    name="s2p-deploy",
    help="Stable Diffusion as INT8/INT4 engines that draw the same pictures as the floating-point model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_ARTIFACTS = (dataset, calibrate, export, build, validate, bench, compare, parts, generate)
for command in (*_ARTIFACTS, export_triton, serve, inspect, verify, sign, doctor, demo):
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 ok, 1 internal or build crash, 2 usage, recipe or input data, 3 gate failed, 4 environment missing, 5 artifact
    integrity, 130 interrupt.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        result = app(given, prog_name="s2p-deploy", standalone_mode=False)
        if result == _INTERRUPTED:  # typer turns KeyboardInterrupt into this
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        debug = "--debug" in given
        if debug:
            traceback.print_exc()
        code, message = _explain(error)
        hint = "" if debug or code != 1 or isinstance(error, S2PError) else " (s2p-deploy --debug ... shows where)"
        return show_error(error, code, message + hint, as_json="--json" in given)
    return result if isinstance(result, int) else 0


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of anything that a command can raise."""
    match error:
        case KeyboardInterrupt() | Abort():
            return _INTERRUPTED, "interrupted: start the same command again to go on"
        case TyperException():
            return error.exit_code, f"{error.format_message()} (s2p-deploy --help lists what there is)"
        case S2PError():
            return error.exit_code, str(error)
        case OSError() if error.errno in _NO_ROOM:
            place = f" at {error.filename}" if error.filename else ""
            return 2, f"the disk is full{place} ({error.strerror}): make room, or choose another --out"
        case _:
            return 1, f"internal error: {type(error).__name__}: {error}"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"s2p-deploy {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries say.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Stable Diffusion as INT8/INT4 engines that draw the same pictures as the floating-point model."""
    if not debug:
        quiet_libraries()
