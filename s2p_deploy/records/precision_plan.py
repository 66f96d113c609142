"""PrecisionPlan: which layer runs in which format, resolved from the recipe's rules into a file that one can diff."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import GetPydanticSchema, TypeAdapter, ValidationError, with_config

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records.files import write_text
from s2p_deploy.records.typed_json import EXACT, first_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from s2p_deploy.records.scale_table import ScaleTable

PLAN_FILE = "plan.yaml"

WeightFormat = Literal["int8", "int4", "none"]
ActFormat = Literal["int8", "int4"]

MOST_BYTES = 4 * 2**20  # some ten thousand layers

_Entry = TypeVar("_Entry")


def _one_of(names: Any) -> GetPydanticSchema:  # noqa: ANN401 - a Literal
    """Annotates a str field that is read from a file: it must be one of the names."""
    return GetPydanticSchema(lambda _source, handler: handler.generate_schema(names))


@with_config(EXACT)
@dataclass(frozen=True)
class LayerPlan:
    """The precision of one Conv or Linear with weights.

    ``weights`` is the name of an integer format, or none; ``activation_quantizer`` names its column, or None; ``rule``
    says why. ``sensitivity`` is the layer's score where the recipe asked for one; ``picture_error`` the mean squared
    error of pictures (of values 0 to 1) where the layer's own quantizers are the only ones, where it was measured.
    """

    name: str
    op: Literal["conv", "linear"]
    weights: Annotated[str, _one_of(WeightFormat)]
    activation_quantizer: str | None
    rule: str
    sensitivity: float | None = None
    picture_error: float | None = None


@with_config(EXACT)
@dataclass(frozen=True)
class ActivationQuantizer:
    """A tensor that layers read, in one activation format; it owns one column of the scale table."""

    name: str
    activations: Annotated[str, _one_of(ActFormat)]
    layers: tuple[str, ...]
    timestep_dependent: bool = True


@dataclass(frozen=True)
class PrecisionPlan:
    """Every layer and every activation quantizer of a denoiser, in module order.

    Example:
        >>> plan = CalibratedModel.open(Path("build/calib")).plan
        >>> name = plan.quantizer_names()[0]
        >>> plan.quantizer(name).activations
        'int8'
    """

    layers: tuple[LayerPlan, ...]
    activation_quantizers: tuple[ActivationQuantizer, ...]

    def quantizer_names(self) -> tuple[str, ...]:
        """Names of the activation quantizers: the columns of the scale table."""
        return tuple(quantizer.name for quantizer in self.activation_quantizers)

    def quantizer(self, name: str) -> ActivationQuantizer:
        """Finds the activation quantizer of a name."""
        return next(quantizer for quantizer in self.activation_quantizers if quantizer.name == name)


def write_plan(plan: PrecisionPlan, path: Path) -> None:
    """Writes ``plan.yaml`` in one piece: where calibration is resumed, a plan that is there is taken as finished."""
    data = {
        "activation_quantizers": {
            quantizer.name: {"activations": quantizer.activations, "timestep_dependent": quantizer.timestep_dependent}
            for quantizer in plan.activation_quantizers
        },
        "layers": {
            layer.name: {name: value for name, value in asdict(layer).items() if name != "name" and value is not None}
            for layer in plan.layers
        },
    }
    write_text(path, yaml.safe_dump(data, sort_keys=False, width=120))


def read_plan(path: Path) -> PrecisionPlan:
    """Reads ``plan.yaml``, as written or edited.

    Raises:
        InputError: it is not a plan; a key, a value's type or a format is unknown (the message names the place); or a
            layer and its activation quantizer do not know each other.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"plan file {path} cannot be read ({error.strerror})") from error
    return plan_from_bytes(data, path)


def plan_from_bytes(text: bytes, path: Path) -> PrecisionPlan:
    """Reads the bytes of the file at ``path`` as :func:`read_plan` does."""
    if len(text) > MOST_BYTES:
        raise InputError(f"{path} is no precision plan: it has more than {MOST_BYTES} bytes")
    try:
        data = _PlainLoader(text.decode()).get_single_data()
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no precision plan ({type(error).__name__})") from error
    sections = ("activation_quantizers", "layers")
    if not isinstance(data, dict) or set(data) != set(sections) or not all(isinstance(data[k], dict) for k in sections):
        raise InputError(f"{path} is no precision plan: it must be a mapping with activation_quantizers and layers")
    if not data["layers"]:
        raise InputError(f"{path} is no precision plan: layers: there is none")
    layers = _entries(LayerPlan, path, "layers", data["layers"], lambda _name: {}, {"activation_quantizer": None})
    readers: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        if layer.activation_quantizer is not None:
            readers[layer.activation_quantizer] = (*readers.get(layer.activation_quantizer, ()), layer.name)
    known = data["activation_quantizers"].keys()
    if unknown := readers.keys() - known:
        raise InputError(f"{path}: activation quantizer {sorted(unknown)[0]} is used by a layer and not defined")
    if unread := known - readers.keys():
        raise InputError(f"{path}: activation quantizer {sorted(map(str, unread))[0]} is used by no layer: remove it")
    quantizers = _entries(
        ActivationQuantizer,
        path,
        "activation_quantizers",
        data["activation_quantizers"],
        lambda name: {"layers": readers[name]},
    )
    return PrecisionPlan(layers, quantizers)


def check_columns(scales: ScaleTable, plan: PrecisionPlan, path: Path) -> None:
    """Raises IntegrityError unless the columns of the scale table at ``path`` are the plan's activation quantizers."""
    if sorted(scales.quantizers) != sorted(plan.quantizer_names()):
        raise IntegrityError(f"{path}: its columns are not the plan's activation quantizers: make the artifact again")


def _entries(
    record: type[_Entry],
    path: Path,
    section: str,
    entries: dict[Any, Any],
    given: Callable[[str], dict[str, Any]],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[_Entry, ...]:
    """Reads a section's entries as records.

    Args:
        record: their type.
        path: the plan, for messages.
        section: the section's name.
        entries: the section's content by name, which is the first field of a record.
        given: the fields of a record by its name that an entry does not have.
        defaults: the fields that an entry may leave out.
    """
    adapter, read = TypeAdapter(record), []
    for name, entry in entries.items():
        where, fixed = f"{path} is no precision plan: {section}.{name}", {"name": name} | given(name)
        if not isinstance(entry, dict) or entry.keys() & fixed.keys():
            raise InputError(f"{where}: it must be a mapping without {' and '.join(fixed)}")
        try:
            # as JSON, whose lists and mappings may become tuples and records where types are strict
            read.append(adapter.validate_json(json.dumps({**defaults, **entry, **fixed})))
        except TypeError as error:
            raise InputError(f"{where} has a value that is no text, number or list") from error
        except ValidationError as error:
            raise InputError(f"{where}.{first_problem(error)}") from error
    return tuple(read)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few of those can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a plan has no aliases")
        return super().compose_node(parent, index)
