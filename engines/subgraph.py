"""A block's subgraph through the same prepare and compile as the whole graph, for teacher-forced comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.backend import check_hint, usable_backend
from s2p_deploy.engines.lowerings import Lowerings
from s2p_deploy.engines.runner import ClosingRunner

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    from numpy.typing import NDArray

    from s2p_deploy.engines.runner import Runner


def runner_for_subgraph(
    model: onnx.ModelProto, backend: str, hint: str | None = None, lowerings: Lowerings | None = None
) -> Runner:
    """A runner of a small model cut from the canonical graph. All its inputs go to ``infer``; ``model`` is not changed.

    Args:
        model: the part, with its weights inside.
        backend: which backend runs it.
        hint: precision hint (None: the backend's default).
        lowerings: of the whole graph's act points (None: the part keeps the canonical form).

    Raises:
        InputError: unknown backend or hint.
        MissingEnvironmentError: the backend's library is missing, or it cannot execute here.
    """
    import onnx_ir as ir

    chosen = usable_backend(backend)
    chosen_hint = check_hint(chosen, hint)
    prepared = ir.from_proto(model)
    chosen.prepare_model(prepared, lowerings or Lowerings(), chosen_hint)
    taken = frozenset(str(value.name) for value in prepared.graph.inputs)
    return _PartRunner(chosen.runner_from_model(ir.to_proto(prepared), chosen_hint), taken)


class _PartRunner(ClosingRunner):
    """Passes on the inputs that are left: a part whose scales became constants takes none."""

    def __init__(self, runner: Runner, taken: frozenset[str]) -> None:
        self._runner, self._taken = runner, taken

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of the part."""
        return self._runner.infer({name: value for name, value in inputs.items() if name in self._taken})

    def close(self) -> None:
        """Closes the runner."""
        self._runner.close()
