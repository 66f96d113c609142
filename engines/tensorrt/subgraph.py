"""Subgraphs on a GPU: a plan is built for the sizes that a subgraph is called with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.child_process import Limits
from s2p_deploy.engines.backend import call_in_child
from s2p_deploy.engines.onnx_files import write_onnx
from s2p_deploy.engines.options import profile_shapes, spec_of
from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.engines.tensorrt.plan import open_plan
from s2p_deploy.engines.tensorrt.runner import TensorRtRunner
from s2p_deploy.records import ShapeProfile, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

    from s2p_deploy.engines.options import Shapes

_TIMEOUT_S = 600.0
_TIMESTEPS = 50  # in the scale table that it is tuned for
_OPEN = ("batch", "timesteps")  # what differs between calls
_LARGEST_BATCH = 32


class SubgraphRunner(ClosingRunner):
    """Runner of a prepared model, whose plan is built in a child process at the first call.

    Inner sizes of a graph of open sizes have no name that a profile could give: they are those of the call's arrays,
    and only the batch and the number of timesteps stay open. A call with other inner sizes builds another plan.
    """

    def __init__(self, library: str, model: ir.Model, device: torch.device) -> None:
        self._library, self._device = library, device
        self._model: ir.Model | None = model
        self._specs = [spec_of(value) for value in model.graph.inputs]
        self._runner: TensorRtRunner | None = None
        self._built_for: tuple[TensorSpec, ...] = ()

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns all outputs of the subgraph."""
        if self._model is None:
            raise ValueError("the runner is closed")
        specs = tuple(_with_sizes_of(spec, inputs[spec.name]) for spec in self._specs)
        if self._runner is None or specs != self._built_for:
            self._release()
            self._runner = self._built(self._model, profile_shapes(specs, _profile(specs, inputs), _TIMESTEPS))
            self._built_for = specs
        return self._runner.infer(inputs)

    def close(self) -> None:
        """Closes the plan."""
        self._release()
        self._model = None

    def _release(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def _built(self, model: ir.Model, shapes: Shapes) -> TensorRtRunner:
        with tempfile.TemporaryDirectory() as folder:
            onnx_path, plan = Path(folder) / "subgraph.onnx", Path(folder) / "subgraph.plan"
            write_onnx(model, onnx_path)
            message = {"library": self._library, "onnx": str(onnx_path), "shapes": shapes, "out": str(plan)}
            message["device"] = str(self._device)
            call_in_child("s2p_deploy.engines.tensorrt.builder:build_in_child", message, Limits(_TIMEOUT_S))
            return TensorRtRunner(open_plan(self._library, plan.read_bytes(), self._device), {})


def _with_sizes_of(spec: TensorSpec, value: NDArray[Any]) -> TensorSpec:
    """Fixes all open sizes but those that stay open to an array's."""
    sizes = (
        size if isinstance(size, int) or size in _OPEN else given
        for size, given in zip(spec.shape, value.shape, strict=True)
    )
    return TensorSpec(spec.name, spec.dtype, tuple(sizes))


def _profile(specs: tuple[TensorSpec, ...], inputs: Mapping[str, NDArray[Any]]) -> ShapeProfile:
    """Returns a profile that is tuned for the call's batch and takes up to 32, or that one."""
    batches = [inputs[spec.name].shape[at] for spec in specs for at, size in enumerate(spec.shape) if size == "batch"]
    batch = max(batches, default=1)
    return ShapeProfile(1, batch, max(batch, _LARGEST_BATCH))
