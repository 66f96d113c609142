"""Engines: ExportedGraph -> Engine -> Runner, for every backend through one contract."""

from s2p_deploy.child_process import Limits
from s2p_deploy.engines.backend import (
    Backend,
    Capabilities,
    backend_by_name,
    backend_names,
    resolve_execution,
    usable_backend,
)
from s2p_deploy.engines.build import build_engine
from s2p_deploy.engines.load import bound_timesteps, check_scales, load_engine
from s2p_deploy.engines.lowerings import Lowerings, layers_not_int8, recorded_lowerings
from s2p_deploy.engines.options import BuildOptions
from s2p_deploy.engines.runner import BoundRunner, Runner, TorchRunner
from s2p_deploy.engines.subgraphs import (
    PreparedSubgraphs,
    RunnableSubgraph,
    Subgraphs,
    engine_subgraphs,
    runner_for_subgraph,
)
from s2p_deploy.records import ShapeProfile, Span

__all__ = [
    "Backend",
    "BoundRunner",
    "BuildOptions",
    "Capabilities",
    "Limits",
    "Lowerings",
    "PreparedSubgraphs",
    "RunnableSubgraph",
    "Runner",
    "ShapeProfile",
    "Span",
    "Subgraphs",
    "TorchRunner",
    "backend_by_name",
    "backend_names",
    "bound_timesteps",
    "build_engine",
    "check_scales",
    "engine_subgraphs",
    "layers_not_int8",
    "load_engine",
    "recorded_lowerings",
    "resolve_execution",
    "runner_for_subgraph",
    "usable_backend",
]
