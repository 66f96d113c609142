"""The contract of a backend, its registry, and the checks of what a build requests of it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from s2p_deploy.child_process import ChildEndedError, call
from s2p_deploy.engines.options import shape_at
from s2p_deploy.errors import EngineBuildError, InputError, MissingEnvironmentError
from s2p_deploy.records import Execution

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from s2p_deploy.child_process import Limits
    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.engines.options import BuildOptions, Shapes
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.engines.subgraphs import Subgraphs
    from s2p_deploy.records import Engine, ExportedGraph, ShapeProfile, TensorSpec

_CLASSES = {
    "onnxruntime": "s2p_deploy.engines.onnxruntime.backend:OnnxRuntimeBackend",
    "openvino": "s2p_deploy.engines.openvino.backend:OpenVinoBackend",
    "tensorrt_rtx": "s2p_deploy.engines.tensorrt.backend:TensorRtBackend",
    "tensorrt": "s2p_deploy.engines.tensorrt.backend:TensorRtBackend",
}
_PRECISION_OF = {"fp32": "f32", "fp16": "f16"}


@dataclass(frozen=True)
class Capabilities:
    """A backend's abilities on this machine.

    ``missing`` says why it cannot be used (None: it can); ``executes`` whether it can also run what it builds. The
    first of ``precisions`` and of ``providers`` is the default; without precisions, it computes in the graph's own.
    ``unavailable`` maps providers that exist but cannot be used here to what to do about it. ``refit`` says whether its
    engines can be made refittable or stripped of their weights: here, with a GPU, or never. ``any_size`` says that they
    take batches and pictures of any size, whatever their profile.
    """

    backend: str
    version: str | None
    missing: str | None
    executes: bool
    dtypes: tuple[str, ...]
    precisions: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    optimizations: tuple[str, ...] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    refit: Literal["here", "with a GPU", "never"] = "never"
    any_size: bool = True


@dataclass(frozen=True)
class CompileRequest:
    """Input of :meth:`Backend.compile`.

    Args:
        model: the graph in the backend's form; its weights are read as it is written or compiled.
        inputs: those of the graph that the model still has.
        options: resolved, nothing left to defaults.
        folder: becomes the engine.
        scratch: is gone after the build; on the same disk as ``folder``.
        example: inputs for one trial run, where the backend can run here.
    """

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    options: BuildOptions
    folder: Path
    scratch: Path
    example: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Compiled:
    """Result of :meth:`Backend.compile`.

    Args:
        files: names of the engine's files.
        environment: library versions and device that must match for them to be loaded.
        compute: ONNX node -> type that the backend reports (int8, fp32, ...); nodes that it does not report are absent.
        notes: anything else worth recording.
    """

    files: tuple[str, ...]
    environment: dict[str, str]
    compute: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """One way to turn an exported graph into something that runs."""

    @property
    def name(self) -> str:
        """Returns the key in :func:`backend_names`."""

    def capabilities(self) -> Capabilities:
        """Describes what it can do on this machine; never raises for a missing library."""

    def targets(self) -> tuple[str, ...]:
        """Lists compute capabilities, such as ``8.6``, that a build can be told to be for; empty: no choice."""

    def prepare_model(self, model: ir.Model, lowerings: Lowerings, execution: Execution) -> None:
        """Gives a canonical graph, or a subgraph of one, the backend's form, in place."""

    def compile(self, request: CompileRequest) -> Compiled:
        """Builds the engine's files. May crash: :func:`s2p_deploy.engines.build_engine` calls it in a child process."""

    def environment(self, execution: Execution | None = None, device: str = "auto") -> dict[str, str]:
        """Describes what must equal the record of an engine that runs so (None: by default) for it to be loaded."""

    def load(
        self,
        engine: Engine,
        files: Mapping[str, bytearray],
        bound: Mapping[str, NDArray[Any]],
        device: str = "auto",
    ) -> Runner:
        """Loads a runner from verified bytes; ``bound`` inputs are set once and never given to ``infer``.

        ``device`` is a context's; an engine for a GPU runs on the one that :func:`.machine.gpu_index` says.
        """

    def write_network(
        self, onnx_file: Path, folder: Path, shapes: Shapes, execution: Execution, device: str = "auto"
    ) -> Compiled:
        """Writes a floating-point network, not the denoiser, in the backend's form to ``folder``, the model first.

        ``shapes`` are the smallest, tuned-for and largest of its input, where the backend's engines have a profile;
        ``device`` the context's, for a backend that builds on the GPU.
        """

    def load_network(self, files: Mapping[str, bytearray], execution: Execution, device: str = "auto") -> Runner:
        """Loads a network that :meth:`write_network` wrote from verified bytes, the model first; as :meth:`load`."""

    def runner_from_model(self, model: ir.Model, execution: Execution) -> Runner:
        """Compiles a prepared model, such as a block, as ``compile`` does, and loads it here."""

    def subgraphs(self, engine: Engine, graph: ExportedGraph, scratch: Path) -> Subgraphs | None:
        """Opens an engine's own files, verified, to cut subgraphs out of them; None where they cannot be cut.

        ``scratch`` is an empty folder that lives as long as the subgraphs do.
        """


def backend_by_name(name: str) -> Backend:
    """Returns the backend of a name; the library behind it is not imported. Raises InputError for an unknown one."""
    if name not in _CLASSES:
        raise InputError(f"unknown backend {name!r}: use one of {', '.join(_CLASSES)}")
    module, _, kind = _CLASSES[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), kind)(name)
    return backend


def backend_names() -> tuple[str, ...]:
    """Lists the names of all backends."""
    return tuple(_CLASSES)


def call_in_child(function: str, message: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Calls a function, ``package.module:name``, that a native library may crash, in a process of its own.

    Raises:
        EngineBuildError: it crashed, ran out of memory, took too long, or failed; the first line says which, the end of
            its log follows.
        S2PError: the expected error that it met, as its own class.
    """
    try:
        return call(function, message, limits)
    except ChildEndedError as error:
        raise EngineBuildError(error.ended.with_tail(f"the build {error.ended.summary(limits)}")) from error


def usable_backend(name: str) -> Backend:
    """Returns the backend of a name, whose library is installed.

    Raises:
        InputError: there is none of that name. MissingEnvironmentError: its library is missing.
    """
    backend = backend_by_name(name)
    missing = backend.capabilities().missing
    if missing is not None:
        raise MissingEnvironmentError(missing)
    return backend


def resolve_execution(backend: Backend, requested: Execution, dtype: str) -> Execution:
    """Resolves precision, provider and optimization: what was requested, and the backend's defaults.

    Args:
        backend: what builds.
        requested: None stands for a default.
        dtype: of the graph, ``fp32`` or ``fp16``.

    Raises:
        InputError: the backend has no such choice. MissingEnvironmentError: it has, but not on this machine.
    """
    able = backend.capabilities()
    advice = able.unavailable.get(requested.provider or "")
    if advice is not None:
        raise MissingEnvironmentError(f"{backend.name} cannot use the provider {requested.provider} here: {advice}")
    known = (*able.providers, *able.unavailable)
    provider = _chosen(backend.name, "provider", requested.provider, able.providers, known)
    optimizations = able.optimizations
    if provider is not None and provider != able.providers[0]:
        optimizations = optimizations[::-1]  # only on the CPU are results that nothing rewrote the default
    optimization = _chosen(backend.name, "optimization", requested.optimization, optimizations)
    own = _PRECISION_OF[dtype]
    if not able.precisions and requested.precision not in {None, own}:
        raise InputError(
            f"{backend.name} computes in the graph's own precision, {own} here: export the graph in another type, or "
            "leave --precision out"
        )
    precision = _chosen(backend.name, "precision", requested.precision, able.precisions or (own,))
    return Execution(precision, provider, optimization)


def _chosen(
    backend: str, what: str, requested: str | None, usable: tuple[str, ...], known: tuple[str, ...] = ()
) -> str | None:
    """Returns the requested one, or the first that is usable."""
    if requested is None:
        return next(iter(usable), None)
    if requested not in usable:
        others = ", ".join(known or usable)
        raise InputError(
            f"{backend} knows no {what} {requested!r}: "
            + (f"use one of {others}" if others else f"it has no such choice, leave --{what} out")
        )
    return requested


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


def check_targets(backend: Backend, options: BuildOptions) -> None:
    """Refuses compute capabilities that the backend does not build for. Raises InputError, naming those it does."""
    if not options.compute_capabilities:
        return
    known = backend.targets()
    unknown = [name for name in options.compute_capabilities if name not in known]
    if not known:
        raise InputError(
            f"{backend.name} engines are not built for a compute capability that is named, TensorRT-RTX's are: leave "
            "--compute-capability out"
        )
    if unknown:
        raise InputError(f"{backend.name} does not build for compute capability {unknown[0]!r}: use {', '.join(known)}")


def example_inputs(graph: ExportedGraph, profile: ShapeProfile) -> dict[str, NDArray[Any]]:
    """Makes inputs for a trial run at the sizes tuned for: zeros, a calibrated timestep, the graph's own scales."""
    sizes = profile.sizes("optimum")
    index = graph.timesteps.calibrated_indices[0]
    values: dict[str, NDArray[Any]] = {}
    for spec in graph.inputs:
        if spec.name == "act_scales":
            values[spec.name] = graph.scales.scales
        else:
            fill = index if spec.name == "timestep_index" else 0
            values[spec.name] = np.full(shape_at(spec, sizes), fill, dtype=spec.dtype)
    return values
