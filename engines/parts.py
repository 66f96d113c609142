"""Parts of an engine, cut out of the very files that it is loaded from: what runs is judged, not its origin.

The cutter is imported when it is needed: it brings torch, and a process that only runs an engine should not hold that.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from s2p_deploy.engines.backend import usable_backend
from s2p_deploy.engines.subgraph import runner_for_subgraph

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.records import Engine, ExportedGraph


@dataclass(frozen=True)
class EnginePart:
    """A part that runs; ``types`` are those of the inputs that it takes, by name."""

    runner: Runner
    types: dict[str, np.dtype[Any]]


class EngineParts(Protocol):
    """Something that parts can be cut out of, by the names of the canonical graph's tensors."""

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> EnginePart:
        """What lies between tensors ``entries`` (and the graph's inputs) and ``outputs``.

        Raises:
            GraphContractError: there is no such tensor.
        """

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of a constant; None where there is none of that name."""


class PreparedParts:
    """Parts of the canonical graph, through a backend's own prepare and compile."""

    def __init__(
        self, graph: ExportedGraph, backend: str, hint: str | None = None, lowerings: Lowerings | None = None
    ) -> None:
        from s2p_deploy.export import GraphParts

        self._cuts = GraphParts(graph)
        self._backend, self._hint, self._lowerings = backend, hint, lowerings

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> EnginePart:
        """See :class:`EngineParts`."""
        model = self._cuts.between(entries, outputs)
        runner = runner_for_subgraph(model, self._backend, self._hint, self._lowerings)
        return EnginePart(runner, input_types(model))

    def constant(self, name: str) -> NDArray[Any] | None:
        """See :class:`EngineParts`."""
        return self._cuts.constant(name)


class OnnxParts:
    """Parts of an engine that is an ONNX file, run by its backend as they are."""

    def __init__(self, engine: Engine, graph: ExportedGraph, onnx_file: Path) -> None:
        from s2p_deploy.export import GraphParts

        self._cuts = GraphParts(graph, onnx_file)
        self._backend, self._hint = usable_backend(engine.backend), engine.hint

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> EnginePart:
        """See :class:`EngineParts`."""
        model = self._cuts.between(entries, outputs)
        return EnginePart(self._backend.runner_from_model(model, self._hint), input_types(model))

    def constant(self, name: str) -> NDArray[Any] | None:
        """See :class:`EngineParts`."""
        return self._cuts.constant(name)


@contextmanager
def engine_parts(engine: Engine, graph: ExportedGraph) -> Iterator[EngineParts | None]:
    """Parts of an engine of ``graph``, while the context lasts; None where its backend's files cannot be cut.

    Raises:
        IntegrityError: a file was changed. MissingEnvironmentError: the backend's library is missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        yield usable_backend(engine.backend).parts(engine, graph, Path(scratch))


def input_types(model: onnx.ModelProto) -> dict[str, np.dtype[Any]]:
    """NumPy types of a model's inputs."""
    from onnx.helper import tensor_dtype_to_np_dtype

    return {value.name: tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input}
