"""Runs the probe: children try the patterns one by one, and a child that dies costs only the pattern it was at."""

from __future__ import annotations

import json
import signal
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.backend import usable_backend
from s2p_deploy.engines.isolation import Ended, Limits, native_errors, run_to_end, summary
from s2p_deploy.engines.probe.patterns import all_patterns, build_patterns
from s2p_deploy.engines.support import Finding, Verdict
from s2p_deploy.engines.support_tables import SupportTable, find_table, key_of, write_to_cache
from s2p_deploy.errors import EngineBuildError, MissingEnvironmentError
from s2p_deploy.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.engines.support import Pattern

WORKER = "s2p_deploy.engines.probe.worker"
PATTERN_LIMITS = Limits(60.0, 6 * 2**30)  # a pattern takes under a second, and under 1 GiB
_STARTUP_S = 120.0
_MAX_DETAIL = 300


@dataclass(frozen=True)
class Task:
    """A pattern in a dtype."""

    pattern: Pattern
    dtype: str


def probe_backend(
    backend: str,
    *,
    patterns: tuple[Pattern, ...] | None = None,
    progress: Progress = silent,
    limits: Limits = PATTERN_LIMITS,
    worker: str = WORKER,
) -> SupportTable:
    """What the installed version of a backend makes of every pattern, in every dtype that it builds from.

    ``limits`` are of one pattern; ``worker`` is the module that the children run.

    Raises:
        InputError: there is no such backend. MissingEnvironmentError: its library is missing.
        EngineBuildError: a child died before it came to a pattern.
    """
    chosen = usable_backend(backend)
    dtypes, hint, key = chosen.capabilities().dtypes, fastest_hint(chosen), key_of(backend)
    if key.device.startswith("sm_"):
        limits = Limits(limits.timeout_s)  # CUDA reserves more memory than it uses
    tasks = [Task(pattern, dtype) for dtype in dtypes for pattern in patterns or all_patterns()]
    findings: list[Finding] = []
    stage = f"probe {backend}"
    progress(stage, 0, len(tasks))
    while len(findings) < len(tasks):
        tell = partial(_tell, progress, stage, len(findings), len(tasks))
        request = {"backend": backend, "hint": hint, "timeout_s": limits.timeout_s}
        findings += _until_it_ends(request, tasks[len(findings) :], limits, worker, tell)
    progress(stage, len(tasks), len(tasks))
    return SupportTable(key, hint, tuple(findings))


def fastest_hint(backend: Backend) -> str:
    """The last hint that computes where the default one does: it rewrites graphs the most."""
    device = backend.environment().get("device")
    hints = backend.capabilities().hints
    return [hint for hint in hints if backend.environment(hint).get("device") == device][-1]


def ensure_probed(backend: str, progress: Progress = silent) -> None:
    """Probes what ``prepare`` asks about and caches it, unless there is a table of the installed version already.

    Where the user has no usable cache folder nothing is done: patterns stay unknown, and the build is conservative.
    """
    if find_table(key_of(backend)) is not None:
        return
    try:
        write_to_cache(probe_backend(backend, patterns=build_patterns(), progress=progress))
    except MissingEnvironmentError:
        return


def _tell(progress: Progress, stage: str, before: int, total: int, more: int) -> None:
    progress(stage, before + more, total)


def _until_it_ends(
    request: dict[str, Any], tasks: list[Task], limits: Limits, worker: str, tell: Callable[[int], None]
) -> list[Finding]:
    """The findings of one child: about all tasks, or up to the one that it died of."""
    with tempfile.TemporaryDirectory() as name:
        scratch, events = Path(name), Path(name) / "events"
        events.touch()
        request |= {"tasks": [asdict(task) for task in tasks], "events": str(events)}
        whole = Limits(_STARTUP_S + limits.timeout_s * len(tasks), limits.memory)
        # the last one is told by the caller, once the child has ended
        ended = run_to_end(worker, request, scratch, whole, lambda: tell(min(len(_read(events)) // 2, len(tasks) - 1)))
        return _findings(tasks, _read(events), ended, limits)


def _read(events: Path) -> list[dict[str, Any]]:
    """All events that are whole."""
    text = events.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _findings(tasks: list[Task], events: list[dict[str, Any]], ended: Ended, limits: Limits) -> list[Finding]:
    """Starts and outcomes alternate; a start without an outcome is what the child died of.

    Raises:
        EngineBuildError: it died before the first start, which says nothing about any pattern.
    """
    if not events:
        raise EngineBuildError(f"the probe could not start: {summary(ended, limits)}\n{ended.log}")
    log = ended.log.encode()
    borders = [*(event["log"] for event in events[::2]), len(log)]
    parts = [log[start:end].decode(errors="replace") for start, end in pairwise(borders)]
    outcomes = [_with_native_words(event, part) for event, part in zip(events[1::2], parts, strict=False)]
    if len(outcomes) < len(parts):
        outcomes.append(_died(Ended(ended.code, parts[-1]), limits))
    return [_finding(task, outcome) for task, outcome in zip(tasks, outcomes, strict=False)]


def _died(ended: Ended, limits: Limits) -> dict[str, Any]:
    verdict: Verdict = "crashes"
    if ended.code == -signal.SIGALRM:
        ended = Ended(None, ended.log)
    detail = summary(ended, limits).removeprefix("the build ")
    if ended.code is None or ended.code >= 0 or "memory" in detail:
        verdict = "fails"
    return {"verdict": verdict, "detail": detail, "compute": "unknown"}


def _with_native_words(outcome: dict[str, Any], log: str) -> dict[str, Any]:
    """A native library's own words, where there are any, say more than the exception that followed."""
    native = native_errors(log.splitlines()) if outcome["verdict"] == "fails" else []
    return outcome | {"detail": native[0].strip()} if native else outcome


def _finding(task: Task, outcome: dict[str, Any]) -> Finding:
    return Finding(task.pattern, task.dtype, **outcome | {"detail": outcome["detail"][:_MAX_DETAIL]})
