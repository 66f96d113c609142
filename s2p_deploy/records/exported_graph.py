"""ExportedGraph: the canonical QDQ ONNX graph, and the map from sites and blocks to its tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.records.json_forms import GraphContent, GraphForm, check_plan, check_points
from s2p_deploy.records.manifest import MANIFEST, Manifest, read_manifest, verify_files
from s2p_deploy.records.precision_plan import PrecisionPlan, plan_from_bytes
from s2p_deploy.records.scale_table import ScaleTable, scale_table_from_bytes
from s2p_deploy.records.strict import checked, read_as
from s2p_deploy.records.timestep_table import TimestepTable, timestep_table_from_bytes

if TYPE_CHECKING:
    from pathlib import Path

CONDITIONING_FILE, TEXT_FILE = "conditioning.onnx", "text.onnx"
_GRAPH, _PLAN, _SCALES, _TIMESTEPS = "graph.json", "plan.yaml", "act_scales.safetensors", "timesteps.json"


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
    and bias. ``node`` is the Conv or MatMul. ``graph`` says which file it is in, ``denoiser.onnx`` or ``text.onnx``.
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
    graph: Literal["denoiser", "text"] = "denoiser"


@dataclass(frozen=True)
class GraphTap:
    """A tensor of the graph that is what a module of the network is given, or gives."""

    module: str
    side: Literal["input", "output"]
    tensor: str


@dataclass(frozen=True)
class GraphBlock:
    """A block (resnet, transformer, resampler): where activations enter and leave, for teacher-forced comparison.

    What depends on conditions alone (row, text, scales) does not count as entering.
    """

    block: str
    entering: tuple[GraphTap, ...]
    leaving: tuple[GraphTap, ...]
    sites: tuple[str, ...]


@dataclass(frozen=True)
class ExportedGraph:
    """An exported graph on disk.

    Files: ``denoiser.onnx``, ``denoiser.onnx.data``, ``graph.json`` (specs, sites, blocks),
    ``act_scales.safetensors`` (what to bind), ``plan.yaml`` and ``timesteps.json``. Where the projected time features
    are an input, ``conditioning.onnx`` computes them: ``timesteps`` float32 [rows] to ``time_projections`` float32
    [rows, P]. Where the products of the text are an input, ``text.onnx`` computes them: ``encoder_hidden_states``
    [batch, tokens, D] to ``text_projections`` [batch, tokens, sum of widths], whose columns are the tensors ``text``.
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
    text: tuple[GraphTap, ...] = ()

    @property
    def onnx_file(self) -> Path:
        """The graph; its weights are external data beside it."""
        return self.folder / "denoiser.onnx"

    @property
    def text_file(self) -> Path:
        """The graph of the text's products, where there is one."""
        return self.folder / TEXT_FILE

    @staticmethod
    def open(folder: Path) -> ExportedGraph:
        """Verifies and reads an exported graph (the ONNX file itself is not parsed)."""
        manifest = read_manifest(folder, "ExportedGraph")
        form = checked(GraphContent, manifest.content, folder / MANIFEST)
        small = verify_files(folder, manifest, keep=(_GRAPH, _PLAN, _SCALES, _TIMESTEPS))
        data = read_as(GraphForm, small[_GRAPH], folder / _GRAPH).model_dump()
        scales = scale_table_from_bytes(small[_SCALES], folder / _SCALES)
        check_points(scales.points, form.points, folder / MANIFEST)
        plan = plan_from_bytes(small[_PLAN], folder / _PLAN)
        check_plan(scales.points, plan.point_names(), folder / _SCALES)
        return ExportedGraph(
            folder,
            manifest,
            data["dtype"],
            inputs=tuple(_spec(item) for item in data["inputs"]),
            outputs=tuple(_spec(item) for item in data["outputs"]),
            sites=tuple(GraphSite(**item) for item in data["sites"]),
            blocks=tuple(_block(item) for item in data["blocks"]),
            plan=plan,
            scales=scales,
            timesteps=timestep_table_from_bytes(small[_TIMESTEPS], folder / _TIMESTEPS),
            text=tuple(GraphTap(**tap) for tap in data["text"]),
        )


def graph_json(
    *,
    dtype: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    sites: tuple[GraphSite, ...],
    blocks: tuple[GraphBlock, ...],
    text: tuple[GraphTap, ...] = (),
) -> str:
    """The text of ``graph.json``."""
    parts: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "sites": sites, "blocks": blocks, "text": text}
    data = {"dtype": dtype} | {key: [asdict(item) for item in items] for key, items in parts.items()}
    return json.dumps(data, indent=1) + "\n"


def _block(data: dict[str, Any]) -> GraphBlock:
    entering, leaving = (tuple(GraphTap(**tap) for tap in data[side]) for side in ("entering", "leaving"))
    return GraphBlock(data["block"], entering, leaving, tuple(data["sites"]))


def _spec(data: dict[str, Any]) -> TensorSpec:
    return TensorSpec(data["name"], data["dtype"], tuple(data["shape"]))
