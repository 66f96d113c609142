"""PrecisionPlan: which site runs in which format, resolved from the recipe's rules into a file that one can diff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class SitePlan:
    """One Conv or Linear with weights. ``weights`` is int8, int4 or none; ``act_point`` names its column, or None."""

    site: str
    op: Literal["conv", "linear"]
    weights: str
    act_point: str | None
    rule: str


@dataclass(frozen=True)
class ActPoint:
    """A tensor that sites read, in one activation format; it owns one column of the scale table."""

    name: str
    activations: str
    sites: tuple[str, ...]
    timestep_dependent: bool = True


@dataclass(frozen=True)
class PrecisionPlan:
    """Every site and every act point of a denoiser, in module order."""

    sites: tuple[SitePlan, ...]
    act_points: tuple[ActPoint, ...]

    def point_names(self) -> tuple[str, ...]:
        """Names of the act points: the columns of the scale table."""
        return tuple(point.name for point in self.act_points)

    def point(self, name: str) -> ActPoint:
        """The act point of a name."""
        return next(point for point in self.act_points if point.name == name)


def write_plan(plan: PrecisionPlan, path: Path) -> None:
    """Writes ``plan.yaml``."""
    data = {
        "act_points": {
            point.name: {"activations": point.activations, "timestep_dependent": point.timestep_dependent}
            for point in plan.act_points
        },
        "sites": {
            site.site: {"op": site.op, "weights": site.weights, "act_point": site.act_point, "rule": site.rule}
            for site in plan.sites
        },
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=120), encoding="utf-8")


def read_plan(path: Path) -> PrecisionPlan:
    """Reads ``plan.yaml``. Raises InputError where it is not a plan."""
    try:
        data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        sites = tuple(SitePlan(site=name, **entry) for name, entry in data["sites"].items())
        points = tuple(
            ActPoint(name=name, sites=tuple(s.site for s in sites if s.act_point == name), **entry)
            for name, entry in data["act_points"].items()
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no precision plan ({type(error).__name__})") from error
    unknown = {s.act_point for s in sites if s.act_point} - {p.name for p in points}
    if unknown:
        raise InputError(f"{path}: act point {sorted(unknown)[0]} is used by a site and not defined")
    return PrecisionPlan(sites, points)
