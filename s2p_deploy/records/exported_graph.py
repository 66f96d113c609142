"""ExportedGraph: the canonical QDQ ONNX graph, and the map from sites and blocks to its tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.records.manifest import Manifest, open_artifact
from s2p_deploy.records.precision_plan import PrecisionPlan, read_plan
from s2p_deploy.records.scale_table import ScaleTable, read_scale_table
from s2p_deploy.records.timestep_table import TimestepTable, read_timestep_table

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: numpy dtype name, and shape with names for dynamic sizes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSite:
    """Where a site is in the graph.

    Tensor names: its input before anything was inserted, the codes (output of its QuantizeLinear; None where
    activations stay in floating point), the quantized weight initializer (None likewise), its output after rescaling
    and bias. ``node`` is the Conv or MatMul.
    """

    site: str
    op: Literal["conv", "linear"]
    node: str
    input: str
    codes: str | None
    weight: str | None
    output: str
    act_point: str | None
    weights: str
    activations: str


@dataclass(frozen=True)
class GraphBlock:
    """A block (resnet, transformer, resampler) with one activation in and one out, for teacher-forced comparison."""

    block: str
    input: str
    output: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class ExportedGraph:
    """An exported graph on disk.

    Files: ``denoiser.onnx``, ``denoiser.onnx.data``, ``graph.json`` (specs, sites, blocks),
    ``act_scales.safetensors`` (what to bind), ``plan.yaml`` and ``timesteps.json``.
    """

    folder: Path
    manifest: Manifest
    dtype: Literal["fp32", "fp16"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: tuple[GraphSite, ...]
    blocks: tuple[GraphBlock, ...]
    plan: PrecisionPlan
    scales: ScaleTable
    timesteps: TimestepTable

    @property
    def onnx_file(self) -> Path:
        """The graph; its weights are external data beside it."""
        return self.folder / "denoiser.onnx"

    @staticmethod
    def open(folder: Path) -> ExportedGraph:
        """Verifies and reads an exported graph (the ONNX file itself is not parsed)."""
        manifest = open_artifact(folder, "ExportedGraph")
        data = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
        return ExportedGraph(
            folder,
            manifest,
            data["dtype"],
            inputs=tuple(_spec(item) for item in data["inputs"]),
            outputs=tuple(_spec(item) for item in data["outputs"]),
            sites=tuple(GraphSite(**item) for item in data["sites"]),
            blocks=tuple(GraphBlock(**{**item, "sites": tuple(item["sites"])}) for item in data["blocks"]),
            plan=read_plan(folder / "plan.yaml"),
            scales=read_scale_table(folder / "act_scales.safetensors"),
            timesteps=read_timestep_table(folder / "timesteps.json"),
        )


def graph_json(
    *,
    dtype: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    sites: tuple[GraphSite, ...],
    blocks: tuple[GraphBlock, ...],
) -> str:
    """The text of ``graph.json``."""
    parts: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "sites": sites, "blocks": blocks}
    data = {"dtype": dtype} | {key: [asdict(item) for item in items] for key, items in parts.items()}
    return json.dumps(data, indent=1) + "\n"


def _spec(data: dict[str, Any]) -> TensorSpec:
    return TensorSpec(data["name"], data["dtype"], tuple(data["shape"]))
