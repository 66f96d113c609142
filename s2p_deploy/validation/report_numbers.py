"""Numbers of ``report.json`` for tables of the page: those of any metric, and those of ``s2p-deploy bench``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

_DRAWN_ELSEWHERE = frozenset({"values", "rows", "step_error", "seconds_per_picture", "blocks", "sites", "points"})
_DESCRIPTION = frozenset({"n", "scheduler", "steps", "guidance_scale"})
_MEGA = 1e6


@dataclass(frozen=True)
class Row:
    """A line of a table of numbers: ``value`` None where it was ``skipped``, or is not a number."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    skipped: str = ""


def number_rows(found: Any, leave_out: Collection[str] = (), prefix: str = "") -> Iterator[Row]:  # noqa: ANN401 - JSON
    """Every number and every reason for none in nested data, under names such as ``median, psnr``.

    Single values, and what the page draws, are left out: lists, and the keys in ``leave_out``.
    """
    if isinstance(found, Mapping) and "skipped" in found:
        yield Row(prefix, None, skipped=str(found["skipped"]))
    elif isinstance(found, Mapping) and "value" in found:
        yield Row(prefix, _real(found["value"]), _real(found.get("low")), _real(found.get("high")), found.get("n"))
    elif isinstance(found, Mapping):
        for key, value in found.items():
            if key not in _DRAWN_ELSEWHERE | _DESCRIPTION | set(leave_out):
                yield from number_rows(value, (), f"{prefix}, {_words(key)}" if prefix else _words(key))
    elif _real(found) is not None:
        yield Row(prefix, _real(found))


@dataclass(frozen=True)
class Measure:
    """A line of the table against floating point; texts with their unit."""

    name: str
    baseline: str
    engine: str
    ratio: str


def bench_rows(bench: Mapping[str, Any], digest: str) -> list[Measure]:
    """What ``s2p-deploy bench`` measured of the engine of that digest, and of floating point beside it.

    Raises:
        InputError: the engine is not in the benchmark.
    """
    engine = next((found for found in bench["engines"] if found["digest"] == digest), None)
    if engine is None:
        raise InputError(f"the benchmark has no engine of digest {digest[:16]}: run s2p-deploy bench on this engine")
    base, ratios = bench["baseline"], engine["ratios"] or {}

    def measure(name: str, shown: Callable[[Any], str], ratio: str = "") -> Measure:
        return Measure(name, shown(base), shown(engine), ratio)

    return [
        measure("step, p50", lambda e: _milliseconds(e["step_p50"]), _ratio(ratios.get("step"))),
        measure("step, p95", lambda e: _milliseconds(e["step_p95"])),
        measure(
            "pictures per minute",
            lambda e: f"{e['images_per_minute']:.3g}" if e["images_per_minute"] else "not measured",
            _ratio(ratios.get("images_per_minute")),
        ),
        measure("load, until the first result", lambda e: f"{e['load_seconds']:.2f} s", _plain(ratios, "load")),
        measure("memory, loaded", lambda e: _megabytes(e["memory"]["loaded"])),
        measure(
            "memory, after all steps", lambda e: _megabytes(e["memory"]["steady"]), _plain(ratios, "steady_memory")
        ),
        measure("memory, peak", lambda e: _megabytes(e["memory"]["peak"]), _plain(ratios, "peak_memory")),
        measure("on disk", lambda e: _megabytes(e["size"]), _plain(ratios, "size")),
    ]


def _real(value: Any) -> float | None:  # noqa: ANN401 - JSON
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _words(key: str) -> str:
    return key.replace("_", " ")


def _milliseconds(number: Mapping[str, Any]) -> str:
    return f"{number['value'] * 1e3:.4g} ms"


def _megabytes(count: int) -> str:
    return f"{count / _MEGA:.4g} MB"


def _ratio(number: Mapping[str, Any] | None) -> str:
    if number is None:
        return ""
    interval = "" if number["low"] is None else f" ({number['low']:.2f} to {number['high']:.2f})"
    return f"{number['value']:.2f}{interval}"


def _plain(ratios: Mapping[str, Any], key: str) -> str:
    return f"{ratios[key]:.2f}" if key in ratios else ""
