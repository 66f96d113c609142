"""Support tables: what a version of a backend makes of each quantized pattern, as a maintainer measured it.

A table ships for every version that a release was tested with; ``tools/check_backends.py`` writes them. Of any other
version nothing is known, and builds take the conservative form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from s2p_deploy.engines.machine import compute_capability, plain_name, platform_name
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import Execution

Verdict = Literal["builds", "fails", "crashes", "wrong", "unknown"]

# a pattern that was tried in two dtypes has the worse verdict of both
_WORST_FIRST: tuple[Verdict, ...] = ("crashes", "wrong", "fails", "unknown", "builds")


@dataclass(frozen=True)
class Pattern:
    """A quantized (or floating) product as a backend sees it.

    Args:
        lowering: of the exported graph, ``rescale``, ``runtime_q``, ``static`` or ``float``, or one that only the check
            tries besides.
        op: ``conv`` or ``matmul``.
        weights: ``int8`` or ``int4`` (per output channel), ``int4_block`` or ``none``.
        activations: ``int8`` or ``none``.
    """

    lowering: str
    op: str
    weights: str
    activations: str


@dataclass(frozen=True)
class Finding:
    """The result of one pattern in one dtype.

    Args:
        pattern: what was built.
        dtype: of the graph, ``fp32`` or ``fp16``.
        verdict: ``wrong`` builds, but computes other values than it should.
        detail: the first line of the error, empty where it builds.
        compute: type that the backend reports for the product, ``unknown`` where it reports none.
    """

    pattern: Pattern
    dtype: str
    verdict: Verdict
    detail: str
    compute: str


@dataclass(frozen=True)
class TableKey:
    """Identity of a table: what it is valid for.

    ``device`` is ``cpu``, ``sm_89`` and the like where the backend executes on a GPU, or ``none`` where it only builds.
    """

    backend: str
    version: str
    platform: str
    device: str

    @property
    def file_name(self) -> str:
        """Returns a plain file name."""
        return plain_name(self.backend, self.version, self.platform, self.device) + ".json"


@dataclass(frozen=True)
class SupportTable:
    """All findings about one version of a backend, and how its patterns ran."""

    key: TableKey
    execution: Execution = field(default_factory=Execution)
    findings: tuple[Finding, ...] = ()

    @cached_property
    def verdicts(self) -> dict[Pattern, Verdict]:
        """Returns one verdict per pattern: it builds only if it builds in every dtype that was tried."""
        verdicts: dict[Pattern, Verdict] = {}
        for finding in self.findings:
            both = {verdicts.get(finding.pattern, finding.verdict), finding.verdict}
            verdicts[finding.pattern] = next(verdict for verdict in _WORST_FIRST if verdict in both)
        return verdicts

    def verdict(self, pattern: Pattern) -> Verdict:
        """Returns the verdict on a pattern; ``unknown`` where it was not tried."""
        return self.verdicts.get(pattern, "unknown")


TABLE = TypeAdapter(SupportTable)


def support_of(backend: str) -> SupportTable:
    """Returns the shipped table of a backend's installed version, without findings where there is none.

    Raises:
        InputError: there is no backend of that name. IntegrityError: the shipped file is damaged.
    """
    key = key_of(backend)
    path = shipped_folder() / key.file_name
    return read_table(path) if path.is_file() else SupportTable(key)


def key_of(backend: str) -> TableKey:
    """Returns the key of what is installed here. Raises InputError for an unknown backend."""
    from s2p_deploy.engines.backend import backend_by_name

    chosen = backend_by_name(backend)
    able = chosen.capabilities()
    if not able.executes:
        device = "none"
    elif chosen.environment().get("device") == "cpu":
        device = "cpu"
    else:
        device = "sm_{}{}".format(*compute_capability() or ("", "unknown"))
    return TableKey(backend, str(able.version), platform_name(), device)


def read_table(path: Path) -> SupportTable:
    """Reads a table. Raises IntegrityError where it is none."""
    try:
        return TABLE.validate_json(path.read_bytes(), strict=False)
    except ValidationError as error:
        raise IntegrityError(f"{path} is no support table: install s2p_deploy again") from error


def shipped_folder() -> Path:
    """Returns the folder of the tables that ship."""
    return Path(str(resources.files("s2p_deploy.engines"))) / "support"
