"""The nouns that pass between stages: frozen, typed, on disk with a manifest. Nothing else crosses a stage's border."""

from s2p_deploy.records.calibrated_model import CalibratedModel, TimeTable
from s2p_deploy.records.chain import Link, verify_chain
from s2p_deploy.records.comparison import (
    Comparison,
    FailedRecipe,
    FloatFigures,
    PictureFigures,
    RecipeFigures,
    RowSqnr,
    Spread,
    StepErrors,
)
from s2p_deploy.records.engine import Engine, SitePrecision
from s2p_deploy.records.exported_graph import ExportedGraph, GraphBlock, GraphSite, GraphTap, TensorSpec
from s2p_deploy.records.latent_dataset import LatentDataset
from s2p_deploy.records.manifest import (
    Base,
    Manifest,
    Parent,
    check_vacant,
    file_digest,
    open_artifact,
    parent_folder,
    read_manifest,
    verify_files,
    write_artifact,
)
from s2p_deploy.records.number import Number, Skipped
from s2p_deploy.records.packed_weights import PackedWeight, write_packed_weights
from s2p_deploy.records.precision_plan import ActPoint, PrecisionPlan, SitePlan
from s2p_deploy.records.prompts import Prompt, PromptSet, read_prompts
from s2p_deploy.records.scale_table import ScaleTable
from s2p_deploy.records.simulation import Simulation
from s2p_deploy.records.timestep_table import TimestepTable
from s2p_deploy.records.transforms import TransformSpec
from s2p_deploy.records.validation_report import GateResult, ValidationReport

__all__ = [
    "ActPoint",
    "Base",
    "CalibratedModel",
    "Comparison",
    "Engine",
    "ExportedGraph",
    "FailedRecipe",
    "FloatFigures",
    "GateResult",
    "GraphBlock",
    "GraphSite",
    "GraphTap",
    "LatentDataset",
    "Link",
    "Manifest",
    "Number",
    "PackedWeight",
    "Parent",
    "PictureFigures",
    "PrecisionPlan",
    "Prompt",
    "PromptSet",
    "RecipeFigures",
    "RowSqnr",
    "ScaleTable",
    "Simulation",
    "SitePlan",
    "SitePrecision",
    "Skipped",
    "Spread",
    "StepErrors",
    "TensorSpec",
    "TimeTable",
    "TimestepTable",
    "TransformSpec",
    "ValidationReport",
    "check_vacant",
    "file_digest",
    "open_artifact",
    "parent_folder",
    "read_manifest",
    "read_prompts",
    "verify_chain",
    "verify_files",
    "write_artifact",
    "write_packed_weights",
]
