"""What the JSON of graphs and engines must look like before anything is made of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.strict import Strict

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_READ_BY_OTHERS = frozenset(
    {"act_scales.safetensors", "timesteps.json"}
    | {f"{name}.onnx{end}" for name in ("conditioning", "text") for end in ("", ".data")}
)

_Name = Annotated[str, Field(min_length=1, max_length=1000)]
_Size = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Dtype = Literal["float32", "float16", "int64"]
_Bits = Annotated[int, Field(ge=0, le=64)]


class TensorForm(Strict):
    """A graph input or output."""

    name: _Name
    dtype: _Dtype
    shape: Annotated[list[_Size | _Name], Field(max_length=8)]


class _Exact(Strict):
    """The fields of a record, and no others."""

    model_config = ConfigDict(extra="forbid")


class SiteForm(_Exact):
    """Where a site is in the graph."""

    site: _Name
    op: Literal["conv", "linear"]
    node: _Name
    input: _Name
    codes: str | None
    weight: str | None
    output: _Name
    act_point: str | None
    weights: _Name
    activations: _Name
    graph: Literal["denoiser", "text"] = "denoiser"


class TapForm(_Exact):
    """Where a module's input or output is in the graph."""

    module: _Name
    side: Literal["input", "output"]
    tensor: _Name


class BlockForm(_Exact):
    """Where a block is in the graph."""

    block: _Name
    entering: list[TapForm]
    leaving: Annotated[list[TapForm], Field(min_length=1)]
    sites: list[_Name]


class GraphForm(Strict):
    """``graph.json``."""

    dtype: Literal["fp32", "fp16"]
    inputs: list[TensorForm]
    outputs: list[TensorForm]
    sites: list[SiteForm]
    blocks: list[BlockForm]
    text: list[TapForm] = Field(default_factory=list)

    @model_validator(mode="after")
    def _text_is_somewhere(self) -> GraphForm:
        if any(site.graph == "text" for site in self.sites) != bool(self.text):
            raise ValueError("the sites of the text and its columns must both be there, or neither")
        return self


class TimestepForm(Strict):
    """``timesteps.json``."""

    scheduler_class: _Name
    scheduler_config: dict[str, Any]
    steps: Annotated[int, Field(ge=1, le=100_000)]
    calibrated: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]
    angle: Annotated[list[Annotated[float, Field(ge=0, le=math.pi / 2)]], Field(min_length=1, max_length=100_000)]
    flow_matching: bool = False
    fractional: Annotated[list[Annotated[float, Field(ge=0)]], Field(default_factory=list, max_length=100_000)]

    @model_validator(mode="after")
    def _rows_exist(self) -> TimestepForm:
        if sorted(set(self.fractional)) != self.fractional:
            raise ValueError("fractional timesteps must be ascending")
        alone = self.flow_matching or any(timestep.is_integer() for timestep in self.fractional)
        training = set() if alone else {*map(float, range(len(self.angle)))}
        if sorted(set(self.calibrated)) != self.calibrated:
            raise ValueError("calibrated timesteps must be ascending")
        if not set(self.calibrated) <= training | set(self.fractional):
            raise ValueError("calibrated timesteps must be within the table")
        if sorted(self.angle) != self.angle:
            raise ValueError("angles must be ascending")
        return self


class PointForm(Strict):
    """An act point: the constant in the graph, and the range of scales that export checked."""

    centre: PositiveFloat
    lowest: PositiveFloat
    highest: PositiveFloat

    @model_validator(mode="after")
    def _ascending(self) -> PointForm:
        if not self.lowest <= self.highest:
            raise ValueError("lowest must not be above highest")
        return self


class PrecisionForm(_Exact):
    """What a site became."""

    site: _Name
    op: _Name
    lowering: _Name
    weight_storage_bits: _Bits
    activation_bits: _Bits
    compute: _Name


class SpanForm(Strict):
    """Latent rows or columns."""

    minimum: PositiveInt
    optimum: Annotated[int, Field(ge=1, le=4096)]
    maximum: PositiveInt
    step: PositiveInt


class ProfileForm(Strict):
    """Batch sizes, and those of the latents where they vary."""

    minimum: PositiveInt
    optimum: Annotated[int, Field(ge=1, le=4096)]
    maximum: PositiveInt
    height: SpanForm | None = None
    width: SpanForm | None = None


class TransformForm(Strict):
    """How a calibrated denoiser's modules differ from the pipeline's own."""

    split: dict[str, PositiveInt]
    smoothed: list[_Name]
    low_rank: dict[str, PositiveInt]


class CalibratedContent(Strict):
    """The content of a CalibratedModel's manifest."""

    tokens: Annotated[int, Field(ge=1, le=2**20)]
    time_slices: dict[str, Annotated[list[_Size], Field(min_length=2, max_length=2)]]
    added_cond: Annotated[int, Field(ge=0, le=2**20)] = 0
    transforms: TransformForm


class LatentsForm(Strict):
    """The trained size of latents that may have others, what each must be a multiple of, and the largest."""

    height: Annotated[int, Field(ge=1, le=4096)]
    width: Annotated[int, Field(ge=1, le=4096)]
    multiple: Annotated[int, Field(ge=1, le=4096)]
    largest: PositiveInt | None = None


class GraphContent(Strict):
    """The content of an ExportedGraph's manifest."""

    denoiser_config: dict[str, Any]
    added_cond: Annotated[int, Field(ge=0, le=2**20)] = 0
    points: dict[str, PointForm]
    latents: LatentsForm | None = None


class OptionsForm(Strict):
    """What of a build's options is read again."""

    static_tolerance: Annotated[float, Field(ge=0)] = 0.0


class EngineContent(Strict):
    """The content of an Engine's manifest."""

    backend: _Name
    added_cond: Annotated[int, Field(ge=0, le=2**20)] = 0
    hint: _Name
    dtype: Literal["fp32", "fp16"]
    inputs: list[TensorForm]
    outputs: list[TensorForm]
    sites: list[PrecisionForm]
    engine_files: Annotated[list[_Name], Field(min_length=1, max_length=16)]
    sizes: dict[str, Annotated[int, Field(ge=0)]]
    environment: dict[str, str]
    denoiser_config: dict[str, Any]
    points: dict[str, PointForm]
    profile: ProfileForm
    options: OptionsForm = OptionsForm()
    lowerings: dict[str, Literal["rescale", "runtime_q", "static"]] = Field(default_factory=dict)
    mixed_rows: bool = True

    @model_validator(mode="after")
    def _distinct(self) -> EngineContent:
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names) or set(self.engine_files) != set(self.sizes):
            raise ValueError("tensors and files must have distinct names, and every file a size")
        return self


class NetworkForm(_Exact):
    """One network of a PipelineParts: its files, the first the one that names the others, and what goes in and out."""

    files: Annotated[list[_Name], Field(min_length=1, max_length=2)]
    input: TensorForm
    outputs: Annotated[list[TensorForm], Field(min_length=1, max_length=8)]
    config: dict[str, Any]


class PartsContent(Strict):
    """The content of a PipelineParts' manifest."""

    backend: _Name
    hint: _Name
    environment: dict[str, str]
    networks: Annotated[dict[_Name, NetworkForm], Field(min_length=1, max_length=8)]
    sizes: dict[str, Annotated[int, Field(ge=0)]]

    @model_validator(mode="after")
    def _every_file_is_of_one_network(self) -> PartsContent:
        files = [file for network in self.networks.values() for file in network.files]
        if len(set(files)) != len(files) or set(files) != set(self.sizes):
            raise ValueError("every file must have a size and be of one network")
        return self


def check_points(points: tuple[str, ...], described: dict[str, PointForm], path: Path) -> None:
    """Raises IntegrityError unless every column of the scale table is another act point, and described."""
    if len(set(points)) != len(points):
        raise IntegrityError(f"{path}: the scale table has two columns of one act point: make the artifact again")
    missing = sorted(set(points) - set(described))
    if missing:
        raise IntegrityError(f"{path}: act point {missing[0]} is not described: make the artifact again")


def check_engine(
    form: EngineContent, files: Collection[str], parents: Collection[str], points: tuple[str, ...], path: Path
) -> None:
    """What the parts of an engine must agree on. Raises IntegrityError where they do not.

    1. every engine file is in the manifest, and none of them is a file that other code reads
    2. the graph that it was built from is known
    3. every column of the scale table is described
    """
    for name in form.engine_files:
        if name not in files or name in _READ_BY_OTHERS:
            raise IntegrityError(f"{path}: {name!r} cannot be an engine's file: build the engine again")
    if "graph" not in parents:
        raise IntegrityError(f"{path} does not say which graph it was built from: build the engine again")
    check_points(points, form.points, path)


def check_plan(points: tuple[str, ...], planned: tuple[str, ...], path: Path) -> None:
    """Raises IntegrityError unless the columns of the scale table are the plan's act points."""
    if sorted(points) != sorted(planned):
        raise IntegrityError(f"{path}: its columns are not the plan's act points: make the artifact again")
