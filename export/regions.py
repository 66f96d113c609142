"""Where the plan's sites and the denoiser's blocks are in a traced graph, found by name scopes, never by order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.errors import GraphContractError
from s2p_deploy.export.scopes import inside, module_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx_ir as ir

    from s2p_deploy.families import Tap
    from s2p_deploy.records import SitePlan

_OPS = {"conv": "Conv", "linear": "MatMul"}
_CONDITIONS = frozenset({"step_index", "act_scales", "encoder_hidden_states", "time_projections"})


@dataclass(frozen=True)
class SiteNode:
    """A planned site in the graph: its Conv or MatMul, and the Add of a linear site's bias (a Conv has it as an input).

    What the node reads is asked anew each time: lowering one site changes what the next one reads.
    """

    plan: SitePlan
    node: ir.Node
    bias_node: ir.Node | None

    @property
    def input(self) -> ir.Value:
        """The activation that the node reads."""
        return _present(self.node.inputs[0])

    @property
    def weight(self) -> ir.Value:
        """The weight that the node reads: an initializer, or what its DequantizeLinear gives."""
        return _present(self.node.inputs[1])

    @property
    def output(self) -> ir.Value:
        """The site's result, bias included, in a graph that is not lowered yet."""
        return (self.bias_node or self.node).outputs[0]


def locate_sites(graph: ir.Graph, plans: Sequence[SitePlan]) -> tuple[SiteNode, ...]:
    """The node of every planned site, in the plan's order.

    Raises:
        GraphContractError: a site has no node or several, or reads no initializer as its weight.
    """
    nodes: dict[tuple[str, str], list[ir.Node]] = {}
    for node in graph:
        nodes.setdefault((module_path(node), node.op_type), []).append(node)
    return tuple(_site_node(plan, nodes) for plan in plans)


def _site_node(plan: SitePlan, nodes: dict[tuple[str, str], list[ir.Node]]) -> SiteNode:
    found = nodes.get((plan.site, _OPS[plan.op]), [])
    if len(found) != 1:
        raise GraphContractError(
            f"site {plan.site} has {len(found)} {_OPS[plan.op]} nodes in the traced graph, not one"
        )
    site = SiteNode(plan, found[0], _bias_node(plan, found[0]))
    if not site.weight.is_initializer():
        raise GraphContractError(f"site {plan.site}: {site.node.name} does not read its weight from an initializer")
    return site


def _bias_node(plan: SitePlan, node: ir.Node) -> ir.Node | None:
    """The Add behind a linear site's MatMul, in the same module, whose other operand is an initializer."""
    if plan.op == "conv":
        return None
    for reader, index in node.outputs[0].uses():
        other = reader.inputs[1 - index] if reader.op_type == "Add" else None
        if other is not None and other.is_initializer() and module_path(reader) == plan.site:
            return reader
    return None


def conditions(graph: ir.Graph) -> frozenset[ir.Value]:
    """Values that depend only on initializers, the row, the scales, the time projections or the text, and sizes."""
    known = {value for value in graph.inputs if value.name in _CONDITIONS} | set(graph.initializers.values())
    for node in graph:
        if node.op_type == "Shape" or all(value is None or value in known for value in node.inputs):
            known.update(node.outputs)
    return frozenset(known)


def tapped(graph: ir.Graph, tap: Tap, ignored: frozenset[ir.Value]) -> ir.Value | None:
    """The activation at a tap; None where nothing enters but what is ``ignored`` (see conditions).

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
