"""Subgraphs of an engine, cut out of the very files that it is loaded from: what runs is judged, not its origin.

The cutter is imported when it is needed: it brings torch, and a process that only runs an engine should not hold that.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from s2p_deploy.engines.backend import resolve_execution, usable_backend
from s2p_deploy.engines.lowerings import Lowerings
from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.records import Execution

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.records import Engine, ExportedGraph


@dataclass(frozen=True)
class RunnableSubgraph:
    """A subgraph that runs; ``types`` are those of the inputs that it takes, by name."""

    runner: Runner
    types: dict[str, np.dtype[Any]]


class Subgraphs(Protocol):
    """A graph that subgraphs can be cut out of, by the names of the canonical graph's tensors."""

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> RunnableSubgraph:
        """Cuts out what lies between tensors ``entries`` (and the graph's inputs) and ``outputs``.

        Raises:
            GraphContractError: there is no such tensor.
        """

    def constant(self, name: str) -> NDArray[Any] | None:
        """Returns the value of a constant; None where there is none of that name."""


class PreparedSubgraphs:
    """Subgraphs of the canonical graph, prepared and compiled as a backend does it."""

    def __init__(
        self,
        graph: ExportedGraph,
        backend: str,
        execution: Execution | None = None,
        lowerings: Lowerings | None = None,
    ) -> None:
        from s2p_deploy.export import Subgraphs as GraphSubgraphs

        self._cuts = GraphSubgraphs(graph)
        self._backend, self._execution, self._lowerings = backend, execution, lowerings

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> RunnableSubgraph:
        """See :class:`Subgraphs`."""
        model = self._cuts.between(entries, outputs)
        runner = runner_for_subgraph(model, self._backend, self._execution, self._lowerings)
        return RunnableSubgraph(runner, input_types(model))

    def constant(self, name: str) -> NDArray[Any] | None:
        """See :class:`Subgraphs`."""
        return self._cuts.constant(name)


class OnnxSubgraphs:
    """Subgraphs of an engine that is an ONNX file, run by its backend as they are."""

    def __init__(self, engine: Engine, graph: ExportedGraph, onnx_file: Path) -> None:
        from s2p_deploy.export import Subgraphs as GraphSubgraphs

        self._cuts = GraphSubgraphs(graph, onnx_file)
        self._backend, self._execution = usable_backend(engine.backend), engine.execution

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> RunnableSubgraph:
        """See :class:`Subgraphs`."""
        model = self._cuts.between(entries, outputs)
        return RunnableSubgraph(self._backend.runner_from_model(model, self._execution), input_types(model))

    def constant(self, name: str) -> NDArray[Any] | None:
        """See :class:`Subgraphs`."""
        return self._cuts.constant(name)


@contextmanager
def engine_subgraphs(engine: Engine, graph: ExportedGraph) -> Iterator[Subgraphs | None]:
    """Opens the subgraphs of an engine of ``graph`` while the context lasts; None where its files cannot be cut.

    Raises:
        IntegrityError: a file was changed. MissingEnvironmentError: the backend's library is missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        yield usable_backend(engine.backend).subgraphs(engine, graph, Path(scratch))


def runner_for_subgraph(
    model: ir.Model,
    backend: str,
    execution: Execution | None = None,
    lowerings: Lowerings | None = None,
) -> Runner:
    """Compiles a model cut from the canonical graph. All its inputs go to ``infer``; ``model`` is not changed.

    Args:
        model: the subgraph; its weights may lie in a file.
        backend: which backend runs it.
        execution: how it runs (None: the backend's defaults).
        lowerings: of the whole graph's activation quantizers (None: the subgraph keeps the canonical form).

    Raises:
        InputError: unknown backend, or one that cannot run so.
        MissingEnvironmentError: the backend's library is missing, or it cannot execute here.
    """
    chosen = usable_backend(backend)
    resolved = resolve_execution(chosen, execution or Execution(), _dtype(model))
    prepared = model.clone()
    chosen.prepare_model(prepared, lowerings or Lowerings(), resolved)
    taken = frozenset(str(value.name) for value in prepared.graph.inputs)
    return _SubgraphRunner(chosen.runner_from_model(prepared, resolved), taken)


def _dtype(model: ir.Model) -> str:
    """``fp16`` where any tensor that goes in or out is, else ``fp32``."""
    types = {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    return "fp16" if any(kind is not None and kind.name == "FLOAT16" for kind in types) else "fp32"


class _SubgraphRunner(ClosingRunner):
    """Passes on the inputs that are left: a subgraph whose scales became constants takes none."""

    def __init__(self, runner: Runner, taken: frozenset[str]) -> None:
        self._runner, self._taken = runner, taken

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns all outputs of the subgraph."""
        return self._runner.infer({name: value for name, value in inputs.items() if name in self._taken})

    def close(self) -> None:
        """Closes the runner."""
        self._runner.close()


def input_types(model: ir.Model) -> dict[str, np.dtype[Any]]:
    """NumPy types of a model's inputs."""
    return {str(value.name): value.dtype.numpy() for value in model.graph.inputs if value.dtype is not None}
