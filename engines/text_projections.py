"""Products of the text for engines that take them as an input: computed once per text by ``text.onnx``, and kept."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.runner import TEXT, TEXT_PROJECTIONS
from s2p_deploy.engines.side_graph import SideGraph
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import TensorSpec
from s2p_deploy.records.exported_graph import TEXT_FILE

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from s2p_deploy.records import Engine

    # text states [1, tokens, D] -> products [1, tokens, sum of widths], both of the engine's dtype
    Project = Callable[[NDArray[np.floating[Any]]], NDArray[np.floating[Any]]]

_MOST_BYTES = 2**29


class TextProjections:
    """The products of text states: those of the texts used last are kept, in ``most_bytes`` or one batch.

    Samples are computed one at a time, so that a text's products do not depend on what else was in its batch. ``spec``
    is what the text states look like.
    """

    def __init__(self, project: Project, spec: TensorSpec, most_bytes: int = _MOST_BYTES) -> None:
        self.spec = spec
        self._project, self._most_bytes = project, most_bytes
        self._kept: OrderedDict[bytes, NDArray[np.floating[Any]]] = OrderedDict()

    def of(self, states: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """[batch, tokens, sum of widths] of text states [batch, tokens, D] in the dtype of ``spec``."""
        found = np.concatenate([self._one(sample) for sample in states[:, None]])
        self._forget(most=max(self._most_bytes, found.nbytes))
        return found

    def close(self) -> None:
        """Forgets everything."""
        self._kept.clear()

    def _one(self, sample: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        key = sample.tobytes()
        if key not in self._kept:
            self._kept[key] = self._project(sample)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _forget(self, most: int) -> None:
        """Drops texts from the one on that was used longest ago."""
        while sum(kept.nbytes for kept in self._kept.values()) > most:
            self._kept.popitem(last=False)


def text_projections(engine: Engine) -> TextProjections:
    """Those of an engine, by its ``text.onnx``, which ONNX Runtime runs on the CPU whatever the engine's backend is.

    Raises:
        IntegrityError: the file is missing or was changed, or is no graph of that kind.
    """
    graph = SideGraph(engine, TEXT_FILE, "--text-projections input")
    taken = next(spec for spec in engine.inputs if spec.name == TEXT_PROJECTIONS)
    spec = next((given for given in graph.inputs() if given.name == TEXT), TensorSpec(TEXT, "", ()))
    if spec != TensorSpec(TEXT, taken.dtype, (*taken.shape[:2], *spec.shape[2:])) or len(spec.shape) != 3:
        raise IntegrityError(f"{graph.path} takes {list(spec.shape)} {spec.dtype}: export the graph again")

    def project(states: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        found = graph.run(TEXT_PROJECTIONS, {TEXT: states})
        wanted = (len(states), *taken.shape[1:])
        if found.shape != wanted or found.dtype != np.dtype(taken.dtype):
            raise IntegrityError(f"{graph.path} gives {list(found.shape)}, not {list(wanted)}: export the graph again")
        return found

    return TextProjections(project, spec)
