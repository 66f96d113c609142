"""The probe's child process: builds one pattern after the other, and says so before and after each.

What it has written when it dies tells the parent which pattern killed it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from s2p_deploy.engines.backend import CompileRequest, usable_backend
from s2p_deploy.engines.isolation import end_with_parent
from s2p_deploy.engines.options import BuildOptions, ShapeProfile
from s2p_deploy.engines.probe.patterns import BATCH, OUTPUT, case_of
from s2p_deploy.engines.support import Pattern, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.engines.probe.patterns import Case

_TOLERANCE = 0.05  # of the largest value: bf16 was off by 0.02, the other row's scale would be by 0.37
_PROFILE = ShapeProfile(1, BATCH, 2 * BATCH)


@dataclass(frozen=True)
class Outcome:
    """What one attempt found out, when the process lives to say so."""

    verdict: Verdict
    detail: str = ""
    compute: str = "unknown"


def attempt(backend: Backend, pattern: Pattern, dtype: str, hint: str) -> Outcome:
    """Builds a pattern as an engine is built, and where the backend executes here, runs it."""
    case = case_of(pattern, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder, onnx_path = Path(name) / "engine", Path(name) / "pattern.onnx"
        folder.mkdir()
        onnx_path.write_bytes(case.model.SerializeToString())
        options = BuildOptions(hint, _PROFILE)
        example = case.trials[0].inputs
        compiled = backend.compile(CompileRequest(onnx_path, case.inputs, options, folder, Path(name), example))
    compute = compiled.compute.get(case.node, "unknown")
    error = largest_error(backend, case, hint) if backend.capabilities().executes else 0.0
    if error <= _TOLERANCE:  # not so for NaN
        return Outcome("builds", compute=compute)
    return Outcome("wrong", f"results are off by {error:.2g} of the largest value", compute)


def largest_error(backend: Backend, case: Case, hint: str) -> float:
    """Over both trials, relative to the largest value that is expected."""
    errors = []
    with backend.runner_from_model(case.model, hint) as runner:
        for trial in case.trials:
            found = runner.infer(trial.inputs)[OUTPUT].astype(np.float64)
            errors.append(np.abs(found - trial.expected).max() / np.abs(trial.expected).max())
    return float(np.max(errors))  # NaN if any is


def work(request: dict[str, Any], one: Callable[[Backend, Pattern, str, str], Outcome] = attempt) -> None:
    """Tries the request's tasks in order and appends an event before and after each to the request's file.

    A task that takes too long ends the process: the alarm's default action needs no cooperation from native code.
    """
    backend = usable_backend(request["backend"])
    with Path(request["events"]).open("a", encoding="utf-8") as events:
        for task in request["tasks"]:
            sys.stdout.flush()
            _tell(events, {"log": os.fstat(sys.stdout.fileno()).st_size})
            signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
            try:
                outcome = one(backend, Pattern(**task["pattern"]), task["dtype"], request["hint"])
            except Exception as error:
                traceback.print_exc()
                outcome = Outcome("fails", _first_line(error))
            signal.setitimer(signal.ITIMER_REAL, 0)
            _tell(events, asdict(outcome))


def main(request_file: str, result_file: str) -> None:
    """Reads the request, works, writes an empty result."""
    end_with_parent()
    work(json.loads(Path(request_file).read_text(encoding="utf-8")))
    Path(result_file).write_text("{}", encoding="utf-8")


def _tell(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
