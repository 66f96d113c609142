"""Gives every parameter its data, to be read from safetensors when the graph is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from s2p_deploy.export.scopes import parameter_name
from s2p_deploy.export.tensors import lazy

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray


class FillWeights(ir.passes.InPlacePass):
    """Parameters ``network.conv_in.weight`` become lazy initializers ``conv_in.weight`` in the graph's dtype.

    ``read`` gives a parameter's data by its name.

    Matrices [out, in] that a graph transposes before MatMul are stored [in, out], and the Transpose goes.

    Requires: an initializer without data is a parameter of the hot denoiser. Ensures: every initializer has data.
    """

    def __init__(self, read: Callable[[str], NDArray[np.float32]], dtype: ir.DataType) -> None:
        super().__init__()
        self.read, self.dtype = read, dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replaces the parameters."""
        graph = model.graph
        for traced in [value for value in graph.initializers.values() if value.const_value is None]:
            readers = [node for node, _ in traced.uses()]
            if len(readers) == 1 and readers[0].op_type == "Transpose":
                transpose = readers[0]
                filled = self._initializer(traced, transposed=True)
                ir.convenience.replace_all_uses_with(transpose.outputs[0], filled)
                graph.remove(transpose, safe=True)
            else:
                filled = self._initializer(traced, transposed=False)
                ir.convenience.replace_all_uses_with(traced, filled)
            del graph.initializers[traced.name or ""]
            graph.initializers.add(filled)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks that every initializer has data."""
        empty = [name for name, value in model.graph.initializers.items() if value.const_value is None]
        if empty:
            raise ir.passes.PostconditionError(f"{empty[0]} has no data")

    def _initializer(self, traced: ir.Value, *, transposed: bool) -> ir.Value:
        key = traced.name or ""
        assert traced.shape is not None  # parameters are traced with their shapes
        shape = traced.shape.numpy()[::-1] if transposed else traced.shape.numpy()
        name = key.removeprefix(parameter_name(""))
        read = self.read
        if transposed:
            return lazy(name, shape, self.dtype, lambda: read(key).T)
        return lazy(name, shape, self.dtype, lambda: read(key))
