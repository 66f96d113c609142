"""s2p_deploy: Stable Diffusion as INT8/INT4 engines that draw the same pictures as the floating-point model.

The names in ``__all__`` are the public API; everything else is internal and may change. Each is imported when it is
first used, so that ``import s2p_deploy`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s2p_deploy.api import (
        adapt,
        build_engine,
        calibrate,
        export_graph,
        join_engines,
        load_engine,
        open_pipeline,
        validate,
    )
    from s2p_deploy.context import Context, Progress
    from s2p_deploy.engines import BoundRunner, BuildOptions, Limits, ShapeProfile, Span
    from s2p_deploy.errors import (
        EngineBuildError,
        GateFailedError,
        GraphContractError,
        InputError,
        IntegrityError,
        MissingEnvironmentError,
        S2PError,
        ServerStoppedError,
    )
    from s2p_deploy.pipeline import EnginePipeline, Schedule, load_engine_pipeline, save_engine_pipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import (
        BaseOptions,
        CalibratedModel,
        ComponentEngines,
        Engine,
        ExportedGraph,
        LatentDataset,
        PrecisionPlan,
        Prompt,
        PromptSet,
        ScaleTable,
        TimestepTable,
        ValidationReport,
    )

__version__ = "0.1.0"
__all__ = [
    "BaseOptions",
    "BoundRunner",
    "BuildOptions",
    "CalibratedModel",
    "ComponentEngines",
    "Context",
    "Engine",
    "EngineBuildError",
    "EnginePipeline",
    "ExportedGraph",
    "GateFailedError",
    "GraphContractError",
    "InputError",
    "IntegrityError",
    "LatentDataset",
    "Limits",
    "MissingEnvironmentError",
    "PrecisionPlan",
    "Progress",
    "Prompt",
    "PromptSet",
    "Recipe",
    "S2PError",
    "ScaleTable",
    "Schedule",
    "ServerStoppedError",
    "ShapeProfile",
    "Span",
    "TimestepTable",
    "ValidationReport",
    "adapt",
    "build_engine",
    "calibrate",
    "export_graph",
    "join_engines",
    "load_engine",
    "load_engine_pipeline",
    "open_pipeline",
    "save_engine_pipeline",
    "validate",
]
_MODULES = {
    "api": (
        "adapt",
        "build_engine",
        "calibrate",
        "export_graph",
        "join_engines",
        "load_engine",
        "open_pipeline",
        "validate",
    ),
    "context": ("Context", "Progress"),
    "engines": ("BoundRunner", "BuildOptions", "Limits", "ShapeProfile", "Span"),
    "errors": (
        "EngineBuildError",
        "GateFailedError",
        "GraphContractError",
        "InputError",
        "IntegrityError",
        "MissingEnvironmentError",
        "S2PError",
        "ServerStoppedError",
    ),
    "pipeline": ("EnginePipeline", "Schedule", "load_engine_pipeline", "save_engine_pipeline"),
    "recipe": ("Recipe",),
    "records": (
        "BaseOptions",
        "CalibratedModel",
        "ComponentEngines",
        "Engine",
        "ExportedGraph",
        "LatentDataset",
        "PrecisionPlan",
        "Prompt",
        "PromptSet",
        "ScaleTable",
        "TimestepTable",
        "ValidationReport",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Imports one of ``__all__``, as PEP 562 has a package do it."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names too, for completion in a shell."""
    return sorted({*globals(), *__all__})
