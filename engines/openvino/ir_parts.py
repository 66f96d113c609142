"""Parts of an IR as models of their own, cut by the ONNX tensor names that it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.parts import EnginePart
from s2p_deploy.errors import GraphContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import openvino
    from numpy.typing import NDArray

    from s2p_deploy.engines.runner import Runner


class IrParts:
    """Cuts copies of ``model``; constants are shared. ``running`` compiles a part as the whole engine is compiled."""

    def __init__(self, model: openvino.Model, running: Callable[[openvino.Model], Runner]) -> None:
        self._model, self._running = model, running

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> EnginePart:
        """The operations between tensors ``entries`` (and the model's inputs) and ``outputs``.

        Raises:
            GraphContractError: the model has no such tensor.
        """
        import openvino

        model = self._model.clone()
        tensors = _tensors(model)
        missing = [name for name in (*entries, *outputs) if name not in tensors]
        if missing:
            raise GraphContractError(f"the engine's IR has no tensor {missing[0]}: it is not made from this graph")
        ends = [tensors[name] for name in outputs]
        for name in entries:
            _replace_by_input(tensors[name], name)
        parameters = _inputs_of(ends)
        part = openvino.Model([openvino.opset13.result(end) for end in ends], parameters, "part")
        types = {value.get_any_name(): np.dtype(value.get_element_type().to_dtype()) for value in part.inputs}
        return EnginePart(self._running(part), types)

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of the constant that a tensor is; None where there is none of that name."""
        constants = (node for node in self._model.get_ops() if node.get_type_name() == "Constant")
        found = next((node for node in constants if node.get_friendly_name() == name), None)
        return None if found is None else np.array(found.data)


def _tensors(model: openvino.Model) -> dict[str, openvino.Output]:
    return {name: value for node in model.get_ops() for value in node.outputs() for name in value.get_names()}


def _replace_by_input(value: openvino.Output, name: str) -> None:
    """Whoever reads ``value`` reads an input of the same name, type and shape from now on."""
    import openvino

    if value.get_node().get_type_name() == "Parameter":
        return
    given = openvino.opset13.parameter(value.get_partial_shape(), value.get_element_type(), name)
    readers = value.get_target_inputs()
    value.set_names(set())
    given.output(0).set_names({name})
    for reader in readers:
        reader.replace_source_output(given.output(0))


def _inputs_of(ends: Sequence[openvino.Output]) -> list[openvino.Node]:
    """The inputs that tensors depend on."""
    pending, seen, inputs = [end.get_node() for end in ends], set(), []
    while pending:
        node = pending.pop()
        if node.get_name() in seen:
            continue
        seen.add(node.get_name())
        if node.get_type_name() == "Parameter":
            inputs.append(node)
        pending.extend(node.input_value(index).get_node() for index in range(node.get_input_size()))
    return inputs
