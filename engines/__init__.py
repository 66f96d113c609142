"""Engines: ExportedGraph -> Engine -> Runner, for every backend through the same four verbs."""

from s2p_deploy.engines.backend import (
    Backend,
    Capabilities,
    backend_by_name,
    backend_names,
    check_hint,
    usable_backend,
)
from s2p_deploy.engines.bound_scales import check_scales
from s2p_deploy.engines.build import build_engine
from s2p_deploy.engines.isolation import Limits
from s2p_deploy.engines.load import load_engine
from s2p_deploy.engines.lowerings import Lowerings, recorded_lowerings
from s2p_deploy.engines.options import BuildOptions, ShapeProfile, Span
from s2p_deploy.engines.parts import EnginePart, EngineParts, PreparedParts, engine_parts
from s2p_deploy.engines.runner import BoundRunner, Runner, TorchRunner
from s2p_deploy.engines.site_report import sites_not_int8
from s2p_deploy.engines.subgraph import runner_for_subgraph

__all__ = [
    "Backend",
    "BoundRunner",
    "BuildOptions",
    "Capabilities",
    "EnginePart",
    "EngineParts",
    "Limits",
    "Lowerings",
    "PreparedParts",
    "Runner",
    "ShapeProfile",
    "Span",
    "TorchRunner",
    "backend_by_name",
    "backend_names",
    "build_engine",
    "check_hint",
    "check_scales",
    "engine_parts",
    "load_engine",
    "recorded_lowerings",
    "runner_for_subgraph",
    "sites_not_int8",
    "usable_backend",
]
