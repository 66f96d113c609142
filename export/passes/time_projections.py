"""Puts the time table in the graph: a constant gathered by the timestep index, or an input with a sample's features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from s2p_deploy.export.regions import module_path
from s2p_deploy.export.tensors import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TIME_PROJECTIONS = "time_projections"


class TimeProjections(ir.passes.InPlacePass):
    """Replaces the traced table, which the graph reads by ``Gather(table, timestep_index)``.

    ``constant``: the table becomes the initializer ``time_projections`` [timesteps, P]. ``input``: the Gather goes, and
    its output becomes the graph input ``time_projections`` [batch, P].

    Requires: exactly one Gather of module ``time``, reading ``timestep_index``.
    """

    def __init__(
        self, projections: NDArray[np.float32], form: Literal["constant", "input"], dtype: ir.DataType
    ) -> None:
        super().__init__()
        self.projections, self.form, self.dtype = projections, form, dtype

    def requires(self, model: ir.Model) -> None:
        """Checks the requirement."""
        gathers = _table_gathers(model)
        if len(gathers) != 1 or gathers[0].inputs[1] not in model.graph.inputs:
            raise ir.passes.PreconditionError(
                f"{len(gathers)} nodes read the time table, expected one, by timestep_index"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replaces the traced table."""
        graph = model.graph
        gather = _table_gathers(model)[0]
        traced, output = gather.inputs[0], gather.outputs[0]
        assert traced is not None  # `requires` saw the Gather
        if self.form == "constant":
            table = lazy(TIME_PROJECTIONS, self.projections.shape, self.dtype, lambda: self.projections)
            graph.initializers.add(table)
            gather.replace_input_with(0, table)
        else:
            given = ir.Value(name=TIME_PROJECTIONS, shape=output.shape, type=ir.TensorType(self.dtype))
            graph.inputs.append(given)
            ir.convenience.replace_all_uses_with(output, given)
            graph.remove(gather, safe=True)
        del graph.initializers[traced.name or ""]
        return ir.passes.PassResult(model, modified=True)


def _table_gathers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Gather" and module_path(node) == "time"]
