"""The nouns that pass between stages: frozen, typed, on disk with a manifest. Nothing else crosses a stage's border."""

from s2p_deploy.records.artifacts import (
    Base,
    BaseOptions,
    Link,
    Manifest,
    Parent,
    check_vacant,
    copy_artifact,
    file_digest,
    open_artifact,
    parent_folder,
    read_manifest,
    verify_chain,
    verify_files,
    write_artifact,
)
from s2p_deploy.records.calibrated_model import CalibratedModel, TimeTable, TransformSpec
from s2p_deploy.records.engine import (
    ComponentEngine,
    ComponentEngines,
    Engine,
    Execution,
    LayerPrecision,
    ShapeProfile,
    Span,
)
from s2p_deploy.records.exported_graph import (
    ExportedGraph,
    GraphBlock,
    GraphDescription,
    GraphLayer,
    GraphTap,
    TensorSpec,
)
from s2p_deploy.records.latent_dataset import LatentDataset
from s2p_deploy.records.precision_plan import ActivationQuantizer, LayerPlan, PrecisionPlan
from s2p_deploy.records.prompts import Prompt, PromptSet, read_prompts
from s2p_deploy.records.scale_table import ScaleTable, TimestepTable
from s2p_deploy.records.validation_report import GateResult, Number, Skipped, ValidationReport

__all__ = [
    "ActivationQuantizer",
    "Base",
    "BaseOptions",
    "CalibratedModel",
    "ComponentEngine",
    "ComponentEngines",
    "Engine",
    "Execution",
    "ExportedGraph",
    "GateResult",
    "GraphBlock",
    "GraphDescription",
    "GraphLayer",
    "GraphTap",
    "LatentDataset",
    "LayerPlan",
    "LayerPrecision",
    "Link",
    "Manifest",
    "Number",
    "Parent",
    "PrecisionPlan",
    "Prompt",
    "PromptSet",
    "ScaleTable",
    "ShapeProfile",
    "Skipped",
    "Span",
    "TensorSpec",
    "TimeTable",
    "TimestepTable",
    "TransformSpec",
    "ValidationReport",
    "check_vacant",
    "copy_artifact",
    "file_digest",
    "open_artifact",
    "parent_folder",
    "read_manifest",
    "read_prompts",
    "verify_chain",
    "verify_files",
    "write_artifact",
]
