"""ExportedGraph: the canonical QDQ ONNX graph, and the map from layers and blocks to its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator, with_config

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.artifacts import MANIFEST, Manifest, read_manifest, verify_files
from s2p_deploy.records.optional_inputs import ImageSlots, LoraSlots, is_optional
from s2p_deploy.records.precision_plan import PLAN_FILE, PrecisionPlan, check_columns, plan_from_bytes
from s2p_deploy.records.scale_table import (
    SCALES_FILE,
    TIMESTEPS_FILE,
    ScaleTable,
    TimestepTable,
    scale_table_from_bytes,
    timestep_table_from_bytes,
)
from s2p_deploy.records.typed_json import EXACT, OPEN, Dimension, LatentSize, Name, read_json, read_value

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

GRAPH_FILE, CONDITIONING_FILE, TEXT_FILE = "graph.json", "conditioning.onnx", "text.onnx"
CONTROL_FILE = "control_embedding.safetensors"  # of a ControlNet: weights of what embeds a control picture

Width = Annotated[int, Field(ge=0, le=2**20)]
ChunkTokens = Annotated[int, Field(ge=1, le=4096)]
MOST_CHUNKS = 16  # of text, each as long as what the encoder reads at once
ChunkCount = Annotated[int, Field(ge=1, le=MOST_CHUNKS)]


@with_config(EXACT)
@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output: numpy dtype name, and shape with names for dynamic sizes."""

    name: Name
    dtype: Annotated[str, Field(pattern="^(float32|float16|int64)$")]
    shape: Annotated[tuple[Dimension | Name, ...], Field(max_length=8)]


@with_config(EXACT)
@dataclass(frozen=True)
class GraphLayer:
    """A layer's place in the graph.

    Tensor names: its input before anything was inserted, the codes (output of its QuantizeLinear; None where
    activations stay in floating point), the quantized weight initializer (None likewise), its output after rescaling
    and bias. ``node`` is the Conv or MatMul. ``graph`` names its file, ``denoiser.onnx`` or ``text.onnx``.
    """

    name: Name
    op: Literal["conv", "linear"]
    node: Name
    input: Name
    codes: str | None
    weight: str | None
    output: Name
    activation_quantizer: str | None
    weights: Name
    activations: Name
    graph: Literal["denoiser", "text"] = "denoiser"


@with_config(EXACT)
@dataclass(frozen=True)
class GraphTap:
    """The tensor of the graph that is the input or output of a module of the network."""

    module: Name
    side: Literal["input", "output"]
    tensor: Name


@with_config(EXACT)
@dataclass(frozen=True)
class GraphBlock:
    """A block (resnet, transformer, resampler): where activations enter and leave, for teacher-forced comparison.

    Tensors that depend on conditions alone (timestep index, text, scales) do not count as entering.
    """

    block: Name
    entering: tuple[GraphTap, ...]
    leaving: Annotated[tuple[GraphTap, ...], Field(min_length=1)]
    layers: tuple[Name, ...]


@with_config(OPEN)
@dataclass(frozen=True, kw_only=True)
class GraphDescription:
    """The content of ``graph.json``."""

    dtype: Literal["fp32", "fp16"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[GraphLayer, ...]
    blocks: tuple[GraphBlock, ...]
    text: tuple[GraphTap, ...] = ()

    @model_validator(mode="after")
    def _check_text(self) -> GraphDescription:
        if any(layer.graph == "text" for layer in self.layers) != bool(self.text):
            raise ValueError("the layers of the text and its columns must both be there, or neither")
        return self


@with_config(OPEN)
@dataclass(frozen=True)
class QuantizerRange:
    """An activation quantizer: the constant in the graph, and the range of scales that export checked."""

    reference_scale: PositiveFloat
    lowest: PositiveFloat
    highest: PositiveFloat

    @model_validator(mode="after")
    def _check_order(self) -> QuantizerRange:
        if not self.lowest <= self.highest:
            raise ValueError("lowest must not be above highest")
        return self


@with_config(OPEN)
@dataclass(frozen=True)
class LatentSizes:
    """Latents of any size: the trained one, what each side must be a multiple of, and the largest (None: no limit)."""

    height: LatentSize
    width: LatentSize
    multiple: LatentSize
    largest: PositiveInt | None = None


@with_config(OPEN)
@dataclass(frozen=True)
class TextChunks:
    """Texts of several chunks: the tokens of one, which the model was calibrated on, and the fewest and most chunks.

    Example:
        >>> TextChunks(77, 1, 4).most_tokens
        308
    """

    tokens: ChunkTokens
    fewest: ChunkCount
    most: ChunkCount

    @model_validator(mode="after")
    def _check_order(self) -> TextChunks:
        if self.fewest > self.most:
            raise ValueError("fewest must not be above most")
        return self

    @property
    def fewest_tokens(self) -> int:
        """Returns the tokens of the shortest text."""
        return self.tokens * self.fewest

    @property
    def most_tokens(self) -> int:
        """Returns the tokens of the longest text."""
        return self.tokens * self.most


@with_config(OPEN)
@dataclass(frozen=True, kw_only=True)
class GraphContent:
    """The graph's own part of its manifest.

    ``denoiser_config`` is what a diffusers pipeline reads from its denoiser; ``added_width`` the width of what the
    projected time features depend on besides the timestep; ``latents`` is None where they have one size, ``chunks``
    where the text has, ``lora`` where the graph has no low-rank branches, ``images`` where it takes no image prompts.
    """

    denoiser_config: dict[str, Any]
    quantizers: dict[str, QuantizerRange]
    added_width: Width = 0
    latents: LatentSizes | None = None
    chunks: TextChunks | None = None
    lora: LoraSlots | None = None
    images: ImageSlots | None = None


@dataclass(frozen=True, kw_only=True)
class ExportedGraph(GraphContent, GraphDescription):
    """An exported graph on disk.

    Files: ``denoiser.onnx``, ``denoiser.onnx.data``, ``graph.json`` (specs, layers, blocks),
    ``act_scales.safetensors`` (what to bind), ``plan.yaml`` and ``timesteps.json``. Where the projected time features
    are an input, ``conditioning.onnx`` computes them: ``timesteps`` float32 [timesteps] to ``time_projections`` float32
    [timesteps, P]. Where the products of the text are an input, ``text.onnx`` computes them: ``encoder_hidden_states``
    [batch, tokens, D] to ``text_projections`` [batch, tokens, sum of widths], whose columns are the tensors ``text``;
    where these have low-rank branches, it takes the inputs of LoRAs too.

    Example:
        >>> graph = ExportedGraph.open(Path("build/graph"))
        >>> graph.onnx_file.name, graph.inputs[0].shape
        ('denoiser.onnx', ('batch', 4, 8, 8))
    """

    folder: Path
    manifest: Manifest
    plan: PrecisionPlan
    scales: ScaleTable
    timesteps: TimestepTable

    @property
    def onnx_file(self) -> Path:
        """Returns the graph's file; its weights are external data beside it."""
        return self.folder / "denoiser.onnx"

    @property
    def optional_inputs(self) -> tuple[TensorSpec, ...]:
        """Returns the inputs for adapters, which are zeros where none acts."""
        return tuple(spec for spec in self.inputs if is_optional(spec.name))

    @property
    def text_file(self) -> Path:
        """Returns the file of the graph of the text's products, where there is one."""
        return self.folder / TEXT_FILE

    @staticmethod
    def open(folder: Path) -> ExportedGraph:
        """Verifies and reads an exported graph (the ONNX file itself is not parsed).

        Raises:
            InputError: there is none, or its plan or scales are none. IntegrityError: it was changed, or is damaged.
        """
        manifest = read_manifest(folder, "ExportedGraph")
        content = read_value(GraphContent, manifest.content, folder / MANIFEST)
        small = verify_files(folder, manifest, keep=(GRAPH_FILE, PLAN_FILE, SCALES_FILE, TIMESTEPS_FILE))
        description = read_json(GraphDescription, small[GRAPH_FILE], folder / GRAPH_FILE)
        scales = scale_table_from_bytes(small[SCALES_FILE], folder / SCALES_FILE)
        check_quantizers(scales.quantizers, content.quantizers, folder / MANIFEST)
        plan = plan_from_bytes(small[PLAN_FILE], folder / PLAN_FILE)
        check_columns(scales, plan, folder / SCALES_FILE)
        return ExportedGraph(
            **vars(content),
            **vars(description),
            folder=folder,
            manifest=manifest,
            plan=plan,
            scales=scales,
            timesteps=timestep_table_from_bytes(small[TIMESTEPS_FILE], folder / TIMESTEPS_FILE),
        )


def check_quantizers(quantizers: tuple[str, ...], described: Mapping[str, QuantizerRange], path: Path) -> None:
    """Raises IntegrityError unless every column of the scale table is another activation quantizer, and described."""
    if len(set(quantizers)) != len(quantizers):
        raise IntegrityError(
            f"{path}: the scale table has two columns of one activation quantizer: make the artifact again"
        )
    missing = sorted(set(quantizers) - set(described))
    if missing:
        raise IntegrityError(f"{path}: activation quantizer {missing[0]} is not described: make the artifact again")
