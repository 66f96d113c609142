"""Export: a CalibratedModel in, one QDQ ONNX graph (an ExportedGraph) out.

The package's names are imported when they are first used. The exporter needs PyTorch and diffusers, seconds of imports;
engines use the graph tools beside it in a process of their own, which needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s2p_deploy.export.exporter import export_graph
    from s2p_deploy.export.graph_contract import check_graph
    from s2p_deploy.export.subgraph import Subgraphs

__all__ = ["Subgraphs", "check_graph", "export_graph"]
_MODULES = {"Subgraphs": "subgraph", "check_graph": "graph_contract", "export_graph": "exporter"}


def __getattr__(name: str) -> object:
    """Imports one of ``__all__``, as PEP 562 has a package do it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
