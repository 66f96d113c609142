"""Engines whose quantizers have one scale per batch: they take samples of one row at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.runner import ClosingRunner, ShapedRunner
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.engines.runner import Runner


class OneRowRunner(ClosingRunner):
    """A runner with lowering ``runtime_q`` somewhere: refuses a batch of mixed rows."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What the runner gives. Raises InputError where ``step_index`` names more than one row."""
        rows = inputs["step_index"]
        if (rows != rows[:1]).any():
            raise InputError(
                "this engine takes batches of one row (lowering runtime_q): give samples of one timestep at a time, "
                "or build with the lowering rescale"
            )
        return self._runner.infer(inputs)

    def tune(self, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        """Tells the runner, if it wants to know."""
        if isinstance(self._runner, ShapedRunner):
            self._runner.tune(shapes)

    def close(self) -> None:
        """Closes the runner."""
        self._runner.close()
