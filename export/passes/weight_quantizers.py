"""Stores planned weights as integer codes behind a DequantizeLinear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.scopes import parameter_name
from s2p_deploy.export.tensors import lazy
from s2p_deploy.export.weight_codes import storage_type, usable_weight_scale, weight_codes
from s2p_deploy.numerics import format_by_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from s2p_deploy.export.regions import SiteNode


class WeightQuantizers(ir.passes.InPlacePass):
    """W becomes DequantizeLinear(codes, scale, axis): one scale per output channel, no zero point.

        W ~ codes * scale      codes = clamp(round(W / scale), qmin, qmax)

    Codes of 3, 5, 9 and 16 levels are stored as INT4, others as INT8: to an engine, fewer levels are INT4 weights whose
    outer codes do not occur. ``read`` gives a parameter's data by its name.

    Conv weights [out, in, kh, kw] have their channels on axis 0, MatMul weights [in, out] on axis 1. Codes come from
    the float32 scale, so that a graph of any dtype has the same codes; the stored scale is rounded to the graph's
    dtype, because ONNX gives DequantizeLinear's result the type of its scale.

    Ensures: every site whose plan quantizes its weight reads it from a DequantizeLinear.
    """

    def __init__(
        self,
        sites: tuple[SiteNode, ...],
        read: Callable[[str], NDArray[np.float32]],
        scales: dict[str, NDArray[np.float32]],
        dtype: ir.DataType,
    ) -> None:
        super().__init__()
        self.sites, self.read, self.scales, self.dtype = sites, read, scales, dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the quantizers."""
        planned = [site for site in self.sites if site.plan.weights != "none"]
        for site in planned:
            self._quantize(model.graph, site)
        return ir.passes.PassResult(model, modified=bool(planned))

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        for site in self.sites:
            producer = site.weight.producer()
            if (site.plan.weights != "none") != (producer is not None and producer.op_type == "DequantizeLinear"):
                raise ir.passes.PostconditionError(f"{site.plan.site}: weights are not {site.plan.weights}")

    def _quantize(self, graph: ir.Graph, site: SiteNode) -> None:
        name, conv = site.plan.site, site.plan.op == "conv"
        fmt = format_by_name(site.plan.weights)
        floating = site.weight
        assert fmt is not None  # the caller took the sites whose weights have a format
        assert floating.shape is not None  # parameters have shapes
        scale = usable_weight_scale(self.scales[name], self.dtype)
        read = self.read

        def codes() -> NDArray[np.generic]:
            made = weight_codes(read(parameter_name(f"{name}.weight")), scale, fmt)
            return made if conv else made.T

        stored = storage_type(fmt)
        shape = floating.shape.numpy()
        inputs = [
            lazy(f"{name}/weight_quantizer/codes", shape, stored, codes),
            lazy(f"{name}/weight_quantizer/scale", (scale.size,), self.dtype, lambda: scale.reshape(-1)),
        ]
        node = ir.node(
            "DequantizeLinear", inputs, {"axis": 0 if conv else 1}, name=f"{name}/weight_quantizer/DequantizeLinear"
        )
        value = node.outputs[0]
        value.name, value.dtype, value.shape = f"{name}/weight_quantizer/dequantized", self.dtype, ir.Shape(shape)
        graph.insert_before(site.node, node)
        site.node.replace_input_with(1, value)
        for initializer in inputs:
            graph.initializers.add(initializer)
        del graph.initializers[floating.name or ""]
