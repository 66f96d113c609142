"""Export: a CalibratedModel in, one QDQ ONNX graph (an ExportedGraph) out."""

from s2p_deploy.export.exporter import export_graph
from s2p_deploy.export.graph_contract import check_graph
from s2p_deploy.export.subgraph import GraphParts, block_subgraph, site_subgraph

__all__ = ["GraphParts", "block_subgraph", "check_graph", "export_graph", "site_subgraph"]
