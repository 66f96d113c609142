"""Locates the plan's layers and the denoiser's blocks in a traced graph: by name scopes, never by order.

Torch's exporter notes on every node which modules it came from.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from s2p_deploy.errors import GraphContractError
from s2p_deploy.records.optional_inputs import is_optional

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx_ir as ir

    from s2p_deploy.families import Tap
    from s2p_deploy.records import LayerPlan

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_ROOT = "network"  # the indexed denoiser's own attribute: module paths are relative to it
_OPS = {"conv": "Conv", "linear": "MatMul"}
_CONDITIONS = frozenset({"timestep_index", "act_scales", "encoder_hidden_states", "time_projections"})


def module_path(node: ir.Node) -> str:
    """Returns the path of the innermost module that ``node`` came from; empty for the denoiser itself.

    The exporter's list ends with the operator: ``['', 'network', 'network.conv_in', 'conv2d']`` gives ``conv_in``.
    """
    return _innermost(node.metadata_props.get(NAME_SCOPES, "['', '']"))


def inside(path: str, prefixes: tuple[str, ...]) -> bool:
    """Returns whether a module path is one of ``prefixes`` or below one."""
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


@dataclass(frozen=True)
class LayerNode:
    """A planned layer in the graph: its Conv or MatMul, and the Add of a linear's bias (an input of a Conv).

    Properties look at the graph anew each time: lowering one layer changes what the next one reads.
    """

    plan: LayerPlan
    node: ir.Node
    bias_node: ir.Node | None

    @property
    def input(self) -> ir.Value:
        """Returns the activation that the node reads."""
        return _present(self.node.inputs[0])

    @property
    def weight(self) -> ir.Value:
        """Returns the weight that the node reads: an initializer, or its DequantizeLinear's result."""
        return _present(self.node.inputs[1])

    @property
    def output(self) -> ir.Value:
        """Returns the layer's result, bias included, in a graph that is not lowered yet."""
        return (self.bias_node or self.node).outputs[0]


def locate_layers(graph: ir.Graph, plans: Sequence[LayerPlan]) -> tuple[LayerNode, ...]:
    """Finds the node of every planned layer, in the plan's order.

    Raises:
        GraphContractError: a layer has no node or several, or reads no initializer as its weight.
    """
    nodes: dict[tuple[str, str], list[ir.Node]] = {}
    for node in graph:
        nodes.setdefault((module_path(node), node.op_type), []).append(node)
    return tuple(_layer_node(plan, nodes) for plan in plans)


def _layer_node(plan: LayerPlan, nodes: dict[tuple[str, str], list[ir.Node]]) -> LayerNode:
    found = nodes.get((plan.name, _OPS[plan.op]), [])
    if len(found) != 1:
        raise GraphContractError(
            f"layer {plan.name} has {len(found)} {_OPS[plan.op]} nodes in the traced graph, not one"
        )
    layer = LayerNode(plan, found[0], _bias_node(plan, found[0]))
    if not layer.weight.is_initializer():
        raise GraphContractError(f"layer {plan.name}: {layer.node.name} does not read its weight from an initializer")
    return layer


def _bias_node(plan: LayerPlan, node: ir.Node) -> ir.Node | None:
    """Finds the Add behind a linear layer's MatMul, in the same module, whose other operand is an initializer."""
    if plan.op == "conv":
        return None
    for reader, index in node.outputs[0].uses():
        other = reader.inputs[1 - index] if reader.op_type == "Add" else None
        if other is not None and other.is_initializer() and module_path(reader) == plan.name:
            return reader
    return None


def conditions(graph: ir.Graph) -> frozenset[ir.Value]:
    """Finds the values that depend only on initializers, sizes and the inputs that are the same for all latents."""
    given = {value for value in graph.inputs if value.name in _CONDITIONS or is_optional(str(value.name))}
    known = given | set(graph.initializers.values())
    for node in graph:
        if node.op_type == "Shape" or all(value is None or value in known for value in node.inputs):
            known.update(node.outputs)
    return frozenset(known)


def tapped(graph: ir.Graph, tap: Tap, ignored: frozenset[ir.Value]) -> ir.Value | None:
    """Finds the activation at a tap; None where nothing enters but ``ignored`` values (see conditions).

    Raises:
        GraphContractError: a module has several activations there, or gives none.
    """
    nodes = [node for node in graph if inside(module_path(node), (tap.module,))]
    found = _entering(nodes, ignored) if tap.side == "input" else _leaving(graph, nodes, ignored)
    if len(found) > 1 or (tap.side == "output" and not found):
        raise GraphContractError(f"module {tap.module} has {len(found)} activations as {tap.side}, expected one")
    return found[0] if found else None


def _entering(nodes: Sequence[ir.Node], ignored: frozenset[ir.Value]) -> list[ir.Value]:
    members = set(nodes)
    read = (value for node in nodes for value in node.inputs if value is not None)
    return _distinct(value for value in read if value.producer() not in members and value not in ignored)


def _leaving(graph: ir.Graph, nodes: Sequence[ir.Node], ignored: frozenset[ir.Value]) -> list[ir.Value]:
    members, outputs = set(nodes), set(graph.outputs)
    made = (value for node in nodes for value in node.outputs if value not in ignored)
    return _distinct(v for v in made if v in outputs or any(reader not in members for reader, _ in v.uses()))


def _distinct(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None  # Conv and MatMul always have their first two inputs
    return value


@lru_cache(maxsize=2**14)  # a denoiser's nodes have a few thousand scopes, and are asked many times
def _innermost(scopes: str) -> str:
    listed: list[str] = ast.literal_eval(scopes)
    innermost = listed[-2] if len(listed) > 1 else ""
    return innermost.removeprefix(_ROOT).removeprefix(".")
