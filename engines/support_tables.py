"""Tables of the probe's findings: a file per backend, version, platform and device, in the user's cache or shipped."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from s2p_deploy.engines.support import Finding, Pattern, Verdict
from s2p_deploy.engines.user_cache import plain_name, private_folder
from s2p_deploy.errors import IntegrityError, MissingEnvironmentError
from s2p_deploy.records.whole_files import write_text

FORMAT = "s2p_deploy.support/1"
_TEXTS = ("dtype", "verdict", "detail", "compute")
_CACHE = "support"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableKey:
    """What a table is valid for.

    ``device`` is ``cpu``, ``sm_89`` and the like where the backend executes on a GPU here, or ``none`` where it only
    builds.
    """

    backend: str
    version: str
    platform: str
    device: str

    @property
    def file_name(self) -> str:
        """A plain file name."""
        return plain_name(self.backend, self.version, self.platform, self.device) + ".json"


@dataclass(frozen=True)
class SupportTable:
    """The findings of one probe, with the precision hint that was built with."""

    key: TableKey
    hint: str
    findings: tuple[Finding, ...]


def key_of(backend: str) -> TableKey:
    """The key of what is installed here. Raises InputError for an unknown backend."""
    from s2p_deploy.engines.backend import backend_by_name
    from s2p_deploy.engines.libraries import compute_capability, platform_name

    found = backend_by_name(backend)
    able = found.capabilities()
    if not able.executes:
        device = "none"
    elif found.environment().get("device") == "cpu":
        device = "cpu"
    else:
        device = "sm_{}{}".format(*compute_capability() or ("", "unknown"))
    return TableKey(backend, str(able.version), platform_name(), device)


def find_table(key: TableKey) -> SupportTable | None:
    """The table of the user's cache, else the shipped one. A broken file is passed over, with a line about it."""
    for folder in (_cache_folder(), shipped_folder()):
        path = folder / key.file_name if folder else None
        if path is None or not path.is_file():
            continue
        try:
            table = read_table(path)
            if table.key == key:
                return table
            problem = f"it is of {table.key.backend} {table.key.version} on {table.key.platform}"
        except IntegrityError as error:
            problem = str(error)
        _LOG.warning("%s is ignored: %s (s2p-deploy doctor --probe renews it)", path, problem)
    return None


def read_table(path: Path) -> SupportTable:
    """Reads a table and checks its digest and every field.

    Raises:
        IntegrityError: it is not what :func:`table_text` writes.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT or data.pop("sha256") != _digest(data):
            raise IntegrityError("its content does not match its digest")
        key, hint = TableKey(**_texts(data["key"])), _texts({"hint": data["hint"]})["hint"]
        return SupportTable(key, hint, tuple(map(_finding, data["findings"])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"it is no table of the probe ({type(error).__name__})") from error


def table_text(table: SupportTable) -> str:
    """The JSON text of a table, one finding per line; the same findings give the same text."""
    data = asdict(table)
    findings = ",\n".join(json.dumps(finding) for finding in data["findings"])
    head = json.dumps({"format": FORMAT, "sha256": _digest(data), "key": data["key"], "hint": table.hint})
    return f'{head[:-1]}, "findings": [\n{findings}\n]}}\n'


def write_to_cache(table: SupportTable) -> Path:
    """Writes a table to the user's cache in one piece and returns its path.

    Raises:
        MissingEnvironmentError: the user has no cache folder, or others may write to it.
    """
    path = private_folder(_CACHE) / table.key.file_name
    write_text(path, table_text(table))
    return path


def shipped_folder() -> Path:
    """The tables that ship, of the versions that this release was tested with."""
    return Path(str(resources.files("s2p_deploy.engines"))) / "support"


def _cache_folder() -> Path | None:
    try:
        return private_folder(_CACHE)
    except MissingEnvironmentError as error:
        _LOG.warning("%s", error)
        return None


def _finding(data: dict[str, Any]) -> Finding:
    texts = _texts({name: data[name] for name in _TEXTS})
    verdicts: dict[str, Verdict] = {verdict: verdict for verdict in get_args(Verdict)}
    pattern = Pattern(**_texts(data["pattern"]))
    return Finding(pattern, texts["dtype"], verdicts[texts["verdict"]], texts["detail"], texts["compute"])


def _texts(data: dict[str, Any]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in data.values()):
        raise TypeError("a field is not text")
    return data


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
