"""What every backend offers: four verbs over one set of small records, found by name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from s2p_deploy.engines.profile_shapes import shape_at
from s2p_deploy.errors import InputError, MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.engines.options import BuildOptions, ShapeProfile
    from s2p_deploy.engines.parts import EngineParts
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.records import Engine, ExportedGraph, TensorSpec

_MODULES = {
    "onnxruntime": "s2p_deploy.engines.onnxruntime",
    "openvino": "s2p_deploy.engines.openvino",
    "tensorrt_rtx": "s2p_deploy.engines.tensorrt",
    "tensorrt": "s2p_deploy.engines.tensorrt",
}


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do here.

    ``missing`` says why it cannot be used (None: it can); ``executes`` whether it can also run what it builds. The
    first of ``hints`` is the default; ``unavailable`` maps those that exist but cannot be used here to what to do about
    it. ``refit`` says whether its engines can be made refittable or stripped of their weights: here, with a GPU, or
    never.
    """

    backend: str
    version: str | None
    missing: str | None
    executes: bool
    dtypes: tuple[str, ...]
    hints: tuple[str, ...]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    refit: Literal["here", "with a GPU", "never"] = "never"


@dataclass(frozen=True)
class CompileRequest:
    """What ``compile`` needs.

    The prepared graph and its inputs, the options (their hint is not None), the folder that becomes the engine, a
    scratch folder, and ``example`` inputs for one trial run where the backend can run here.
    """

    onnx_path: Path
    inputs: tuple[TensorSpec, ...]
    options: BuildOptions
    folder: Path
    scratch: Path
    example: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Compiled:
    """What ``compile`` made.

    Names of its files, what must match to load them, the compute type that the backend reports of ONNX nodes (int8,
    fp32, ...; nodes that it does not report are left out), and anything else worth recording.
    """

    files: tuple[str, ...]
    environment: dict[str, str]
    compute: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """One way to turn an exported graph into something that runs."""

    @property
    def name(self) -> str:
        """What it is asked for by."""

    def capabilities(self) -> Capabilities:
        """What it can do on this machine; never raises for a missing library."""

    def prepare(self, graph: ExportedGraph, folder: Path, options: BuildOptions) -> Path:
        """Derives the backend's ONNX file from the canonical graph, into ``folder``."""

    def prepare_model(self, model: ir.Model, lowerings: Lowerings, hint: str | None) -> None:
        """The passes of ``prepare`` alone, in place: what validation applies to a block's subgraph."""

    def compile(self, request: CompileRequest) -> Compiled:
        """Builds the engine's files. May crash: :func:`s2p_deploy.engines.build_engine` calls it in a child process."""

    def environment(self, hint: str | None = None) -> dict[str, str]:
        """What must equal the record of an engine of ``hint`` (None: the default) for it to be loaded here."""

    def load(self, engine: Engine, files: Mapping[str, bytearray], bound: Mapping[str, NDArray[Any]]) -> Runner:
        """A runner from verified bytes; ``bound`` inputs are set once and never given to ``infer``."""

    def runner_from_model(self, model: onnx.ModelProto, hint: str) -> Runner:
        """Compiles a small in-memory model that was prepared, as ``compile`` does, and runs it here."""

    def parts(self, engine: Engine, graph: ExportedGraph, scratch: Path) -> EngineParts | None:
        """Cuts parts out of an engine's own files, verified; None where nothing can be cut out of them.

        ``scratch`` is an empty folder that lives as long as the parts do.
        """


def backend_by_name(name: str) -> Backend:
    """The backend of a name. Raises InputError for an unknown one; the library behind it is not imported."""
    if name not in _MODULES:
        raise InputError(f"unknown backend {name!r}: use one of {', '.join(_MODULES)}")
    backend: Backend = importlib.import_module(_MODULES[name]).backend(name)
    return backend


def backend_names() -> tuple[str, ...]:
    """Names of all backends."""
    return tuple(_MODULES)


def usable_backend(name: str) -> Backend:
    """The backend of a name, whose library is installed.

    Raises:
        InputError: there is none of that name. MissingEnvironmentError: its library is missing.
    """
    backend = backend_by_name(name)
    missing = backend.capabilities().missing
    if missing is not None:
        raise MissingEnvironmentError(missing)
    return backend


def check_hint(backend: Backend, hint: str | None) -> str:
    """The precision hint to use: the given one, or the backend's default.

    Raises:
        InputError: the backend knows no such hint. MissingEnvironmentError: it does, but not on this machine.
    """
    able = backend.capabilities()
    if hint is not None and hint in able.unavailable:
        raise MissingEnvironmentError(f"{backend.name} cannot use the hint {hint} here: {able.unavailable[hint]}")
    if hint is not None and hint not in able.hints:
        known = (*able.hints, *able.unavailable)
        raise InputError(f"{backend.name} knows no hint {hint!r}: use one of {', '.join(known)}")
    return hint or able.hints[0]


def check_refit(backend: Backend, options: BuildOptions) -> None:
    """Refuses a refittable or stripped engine where the backend cannot build one here.

    Raises:
        InputError: the backend has no such engines. MissingEnvironmentError: it has, but something is missing here.
    """
    if not (options.refit or options.stripped):
        return
    can = backend.capabilities().refit
    if can == "never":
        raise InputError(f"{backend.name} engines cannot be refitted or stripped of their weights: TensorRT's can")
    if can == "with a GPU":
        raise MissingEnvironmentError(
            f"{backend.name} builds refittable and stripped engines only beside a GPU's driver, and there is none here"
        )


def example_inputs(graph: ExportedGraph, profile: ShapeProfile) -> dict[str, NDArray[Any]]:
    """Inputs for a trial run at the sizes tuned for: zeros, a calibrated row, and the graph's own scales."""
    sizes = profile.sizes("optimum")
    row = graph.timesteps.calibrated_rows[0]
    values: dict[str, NDArray[Any]] = {}
    for spec in graph.inputs:
        if spec.name == "act_scales":
            values[spec.name] = graph.scales.scales
        else:
            fill = row if spec.name == "step_index" else 0
            values[spec.name] = np.full(shape_at(spec, sizes), fill, dtype=spec.dtype)
    return values
