"""Export: a CalibratedModel in, one QDQ ONNX graph (an ExportedGraph) out.

What the package offers is imported when it is first asked for. The exporter needs PyTorch and diffusers, seconds of
imports; engines use the graph tools beside it in a process of their own, which needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s2p_deploy.export.exporter import export_graph
    from s2p_deploy.export.graph_contract import check_graph
    from s2p_deploy.export.subgraph import GraphParts, block_subgraph, site_subgraph

__all__ = ["GraphParts", "block_subgraph", "check_graph", "export_graph", "site_subgraph"]
_MADE_IN = {
    "GraphParts": "subgraph",
    "block_subgraph": "subgraph",
    "check_graph": "graph_contract",
    "export_graph": "exporter",
    "site_subgraph": "subgraph",
}


def __getattr__(name: str) -> object:
    """One of ``__all__``, as PEP 562 has a package give it."""
    if name not in _MADE_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MADE_IN[name]}"), name)
