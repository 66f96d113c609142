"""Every error that this package raises on purpose, with the exit code that the command line gives it."""

from __future__ import annotations


class S2PError(Exception):
    """Base of all expected errors. The message is one line: what is wrong, where, and what to do.

    Example:
        >>> try:
        ...     build_engine("build/nothing", backend="onnxruntime", out="build/other")
        ... except S2PError as error:
        ...     type(error).__name__, error.exit_code
        ('InputError', 2)
    """

    exit_code = 1


class InputError(S2PError):
    """Usage, recipe or input data is wrong."""

    exit_code = 2


class GateFailedError(S2PError):
    """A gate that the recipe fixed before the run failed, or could not be measured."""

    exit_code = 3


class MissingEnvironmentError(S2PError):
    """A library, device or driver that the request needs is not there."""

    exit_code = 4


class IntegrityError(S2PError):
    """An artifact does not match its manifest, or does not belong to its parent."""

    exit_code = 5


class EngineBuildError(S2PError):
    """A backend failed or crashed while it built an engine; the message carries the end of its log."""


class GraphContractError(S2PError):
    """A graph breaks the contract of the exported graph: a defect of this package or a foreign graph."""


class ServerStoppedError(S2PError):
    """A server was stopped by Ctrl-C: nothing went wrong, and there is nothing to go on with."""

    exit_code = 130
