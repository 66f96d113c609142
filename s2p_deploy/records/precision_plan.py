"""PrecisionPlan: which site runs in which format, resolved from the recipe's rules into a file that one can diff."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2p_deploy.errors import InputError
from s2p_deploy.records.strict import first_problem

if TYPE_CHECKING:
    from pathlib import Path

WeightFormat = Literal["int8", "int4", "levels3", "levels5", "levels9", "none"]
ActFormat = Literal["int8", "int4"]

MOST_BYTES = 4 * 2**20  # some ten thousand sites


@dataclass(frozen=True)
class SitePlan:
    """One Conv or Linear with weights.

    ``weights`` is the name of an integer format, or none; ``act_point`` names its column, or None; ``rule`` says why.
    ``sensitivity`` is the site's score where the recipe asked for one.
    """

    site: str
    op: Literal["conv", "linear"]
    weights: str
    act_point: str | None
    rule: str
    sensitivity: float | None = None


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
            site.site: {name: value for name, value in asdict(site).items() if name != "site" and value is not None}
            for site in plan.sites
        },
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=120), encoding="utf-8")


def read_plan(path: Path) -> PrecisionPlan:
    """Reads ``plan.yaml``, as written or edited.

    Raises:
        InputError: it is not a plan; a key, a value's type or a format is unknown (the message names the place); or a
            site and its act point do not know each other.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} is no precision plan ({type(error).__name__})") from error
    return plan_from_bytes(data, path)


def plan_from_bytes(text: bytes, path: Path) -> PrecisionPlan:
    """The same for the bytes of the file at ``path``."""
    if len(text) > MOST_BYTES:
        raise InputError(f"{path} is no precision plan: it has more than {MOST_BYTES} bytes")
    try:
        read = _PlainLoader(text.decode()).get_single_data()
        if not isinstance(read, dict):
            raise InputError(f"{path} is no precision plan: it must be a mapping with act_points and sites")
        data = _PlanFile.model_validate(read)
    except ValidationError as error:
        raise InputError(f"{path} is no precision plan: {first_problem(error)}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no precision plan ({type(error).__name__})") from error
    readers: dict[str, list[str]] = {}
    for name, site in data.sites.items():
        if site.act_point is not None:
            readers.setdefault(site.act_point, []).append(name)
    unknown, unread = readers.keys() - data.act_points.keys(), data.act_points.keys() - readers.keys()
    if unknown:
        raise InputError(f"{path}: act point {sorted(unknown)[0]} is used by a site and not defined")
    if unread:
        raise InputError(f"{path}: act point {sorted(unread)[0]} is used by no site: remove it")
    return PrecisionPlan(
        tuple(SitePlan(site=name, **site.model_dump()) for name, site in data.sites.items()),
        tuple(
            ActPoint(name=name, sites=tuple(readers[name]), **point.model_dump())
            for name, point in data.act_points.items()
        ),
    )


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few of those can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a plan has no aliases")
        return super().compose_node(parent, index)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _SiteEntry(_Entry):
    op: Literal["conv", "linear"]
    weights: WeightFormat
    act_point: str | None = None
    rule: str
    sensitivity: float | None = None


class _PointEntry(_Entry):
    activations: ActFormat
    timestep_dependent: bool


class _PlanFile(_Entry):
    act_points: dict[str, _PointEntry]
    sites: dict[str, _SiteEntry] = Field(min_length=1)
