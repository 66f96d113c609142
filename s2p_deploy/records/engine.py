"""Engine and ComponentEngines: a backend's files for a denoiser, and for the networks around it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator, with_config

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records.artifacts import MANIFEST, Manifest, read_manifest, verify_files
from s2p_deploy.records.exported_graph import (
    CONDITIONING_FILE,
    CONTROL_FILE,
    TEXT_FILE,
    QuantizerRange,
    TensorSpec,
    Width,
    check_quantizers,
)
from s2p_deploy.records.optional_inputs import BOUND_MATRICES, IMAGE_REACH, ImageSlots, LoraSlots, is_optional
from s2p_deploy.records.scale_table import (
    SCALES_FILE,
    TIMESTEPS_FILE,
    ScaleTable,
    TimestepTable,
    scale_table_from_bytes,
    timestep_table_from_bytes,
)
from s2p_deploy.records.typed_json import EXACT, OPEN, Bits, Bytes, Name, read_value

if TYPE_CHECKING:
    from pathlib import Path

# Files of an engine's folder that are read here, not by its backend.
_READ_BY_OTHERS = frozenset(
    {SCALES_FILE, TIMESTEPS_FILE, CONTROL_FILE}
    | {f"{name}{end}" for name in (CONDITIONING_FILE, TEXT_FILE) for end in ("", ".data")}
)
LOW_NOISE = "low_noise"  # the parent that lies inside of joined engines
_FLOATING = 16  # bits, at least
_TUNED_FOR = Annotated[int, Field(le=4096)]  # one set of a backend's kernels is made for it


@with_config(OPEN)
@dataclass(frozen=True)
class Span:
    """Latent heights or widths of an engine, or its texts' tokens: smallest, tuned for, largest; multiples of ``step``.

    Example:
        >>> 96 in Span(64, 64, 128, step=8), 100 in Span(64, 64, 128, step=8)
        (True, False)
    """

    minimum: int
    optimum: _TUNED_FOR
    maximum: int
    step: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"sizes {self.minimum}:{self.optimum}:{self.maximum} must be ascending from 1")
        odd = [size for size in (self.minimum, self.optimum, self.maximum) if size % self.step]
        if odd:
            raise InputError(f"a latent size of {odd[0]} is no multiple of {self.step}, as this network needs")

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.minimum)
        steps = f" in steps of {self.step}" if self.step > 1 else ""
        return f"{self.minimum} to {self.maximum}{steps}"

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum and size % self.step == 0


@dataclass(frozen=True)
class Execution:
    """How a backend runs a graph: three choices that do not depend on each other.

    Args:
        precision: what is computed in where it is not integer: ``f32``, ``bf16`` or ``f16``.
        provider: ONNX Runtime's execution provider: ``cpu``, ``cuda``, ``tensorrt`` or ``nv_tensorrt_rtx``.
        optimization: ONNX Runtime's graph optimization: ``reference`` (none) or ``full``.

    In a request None is the backend's default; of an engine it is a choice that its backend does not have.
    """

    precision: str | None = None
    provider: str | None = None
    optimization: str | None = None

    def __str__(self) -> str:
        named = (("precision", self.precision), ("provider", self.provider), ("optimization", self.optimization))
        return ", ".join(f"{name} {value}" for name, value in named if value is not None)


@with_config(OPEN)
@dataclass(frozen=True)
class ShapeProfile:
    """Batch sizes of an engine: the smallest, the one it is tuned for, the largest.

    TensorRT engines refuse others; the CPU backends take any. Where a graph's latents may have any size, ``height`` and
    ``width`` say which ones the engine takes (None: the trained size); every backend's refuse others. So do ``tokens``
    where a graph's text may have any number of them (None: one chunk's).

    Example:
        >>> ShapeProfile(2, 4, 16, height=Span(64, 64, 128, step=8), width=Span(64, 64, 128, step=8)).sizes("maximum")
        {'batch': 16, 'height': 128, 'width': 128}
    """

    minimum: int = 1
    optimum: _TUNED_FOR = 2
    maximum: int = 32
    height: Span | None = None
    width: Span | None = None
    tokens: Span | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"batch profile {self.minimum}/{self.optimum}/{self.maximum} must be ascending from 1")

    def to_json(self) -> dict[str, Any]:
        """Returns the profile as a mapping; without height, width and tokens where those are fixed."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def sizes(self, end: Literal["minimum", "optimum", "maximum"]) -> dict[str, int]:
        """Returns every open size by its name in the graph."""
        spans = {"height": self.height, "width": self.width, "tokens": self.tokens}
        others = {name: int(getattr(span, end)) for name, span in spans.items() if span is not None}
        return {"batch": int(getattr(self, end))} | others

    def check_latents(self, height: int, width: int) -> None:
        """Raises InputError where latents of that size are outside the profile."""
        if self.height is None or self.width is None:
            return
        if height not in self.height or width not in self.width:
            raise InputError(
                f"this engine takes latents of height {self.height} and width {self.width}, got {height}x{width}: "
                "build one for that size"
            )

    def check_tokens(self, tokens: int) -> None:
        """Raises InputError where a text of so many tokens is outside the profile."""
        if self.tokens is not None and tokens not in self.tokens:
            raise InputError(
                f"this engine takes texts of {self.tokens} tokens, got {tokens}: build one for that many (export and "
                "build with --chunks)"
            )


@with_config(EXACT)
@dataclass(frozen=True)
class LayerPrecision:
    """One layer of an engine.

    ``compute`` is what the backend reports (int8, f32, fp16, ...) or ``unknown``, never a claim.
    """

    name: Name
    op: Name
    lowering: Name
    weight_storage_bits: Bits
    activation_bits: Bits
    compute: Name


@with_config(OPEN)
@dataclass(frozen=True)
class EngineOptions:
    """Options of a build that loading depends on.

    ``static_tolerance`` is the fraction by which a column of the scale table may vary and still become a constant;
    ``stripped`` says that the weights are put in from the graph.
    """

    static_tolerance: Annotated[float, Field(ge=0)] = 0.0
    stripped: bool = False


@with_config(OPEN)
@dataclass(frozen=True, kw_only=True)
class EngineContent:
    """The engine's own part of its manifest.

    ``precision``, ``provider`` and ``optimization`` are those of its :class:`Execution`; ``environment`` what must
    match to load it (library version, device, compute capability); ``denoiser_config`` what a diffusers pipeline reads
    from its denoiser; ``added_width`` the width of what the projected time features depend on besides the timestep;
    ``sizes`` the bytes of every engine file; ``lowerings`` the lowering of every activation quantizer whose scales
    became operators of their own, and ``mixed_timesteps`` whether the samples of a batch may be at different timesteps;
    ``options`` the build's options that a loader reads; ``lora`` the low-rank branches and ``images``
    the places of image prompts, where the graph has some. ``boundary_ratio`` is that of joined engines: the share of
    the training timesteps, from 0 on, that the engine inside runs.
    """

    backend: Name
    precision: Name
    provider: Name | None
    optimization: Name | None
    dtype: Literal["fp32", "fp16"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[LayerPrecision, ...]
    engine_files: Annotated[tuple[Name, ...], Field(min_length=1, max_length=16)]
    sizes: dict[str, Bytes]
    environment: dict[str, str]
    denoiser_config: dict[str, Any]
    quantizers: dict[str, QuantizerRange]
    profile: ShapeProfile
    options: EngineOptions = EngineOptions()
    added_width: Width = 0
    lowerings: dict[str, Literal["rescale", "runtime_q", "static"]] = field(default_factory=dict)
    mixed_timesteps: bool = True
    lora: LoraSlots | None = None
    images: ImageSlots | None = None
    boundary_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _check_names(self) -> EngineContent:
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names) or set(self.engine_files) != set(self.sizes):
            raise ValueError("tensors and files must have distinct names, and every file a size")
        packed = [tensor for tensor in self.inputs if tensor.name in BOUND_MATRICES]
        fixed = all(len(tensor.shape) == 1 and isinstance(tensor.shape[0], int) for tensor in packed)
        if len(packed) != (0 if self.lora is None else len(BOUND_MATRICES)) or not fixed:
            raise ValueError("low-rank branches have two packed inputs of one size each")
        return self


@dataclass(frozen=True, kw_only=True)
class Engine(EngineContent):
    """A folder with the backend's file(s) (``engine_files``), ``act_scales.safetensors`` and ``timesteps.json``.

    Where the projected time features are an input, ``conditioning.onnx`` computes them, and where the products of the
    text are, ``text.onnx``, as in the exported graph. Joined engines have another one inside, ``low_noise``, which runs
    the timesteps below their ``boundary``.

    Example:
        >>> engine = Engine.open(Path("build/engine"))
        >>> engine.backend, engine.scales.scales.shape[0]
        ('onnxruntime', 1000)
    """

    folder: Path
    manifest: Manifest
    scales: ScaleTable
    timesteps: TimestepTable
    low_noise: Engine | None = None

    @property
    def execution(self) -> Execution:
        """Precision, provider and optimization in one record."""
        return Execution(self.precision, self.provider, self.optimization)

    @property
    def is_quantized(self) -> bool:
        """Returns whether a layer's weights or activations have fewer bits than floating point."""
        return any(min(layer.weight_storage_bits, layer.activation_bits) < _FLOATING for layer in self.layers)

    @property
    def boundary(self) -> float:
        """Returns the timestep below which the engine inside runs; 0 where there is none."""
        return (self.boundary_ratio or 0.0) * self.timesteps.training_timesteps

    @property
    def on_gpu(self) -> bool:
        """Returns whether it was built for a GPU."""
        return self.environment.get("device", "cpu") != "cpu"

    @property
    def takes_time_projections(self) -> bool:
        """Returns whether the projected time features are an input: timesteps of any schedule can be bound."""
        return any(spec.name == "time_projections" for spec in self.inputs)

    @property
    def takes_text_projections(self) -> bool:
        """Returns whether the products of the text are an input, in the place of the text."""
        return any(spec.name == "text_projections" for spec in self.inputs)

    @staticmethod
    def open(folder: Path) -> Engine:
        """Reads and verifies all but the engine files: the backend's ``load`` hashes the very bytes it loads.

        Raises:
            InputError: there is no engine, or its scales are none. IntegrityError: it was changed, or is damaged.
        """
        manifest = read_manifest(folder, "Engine")
        path = folder / MANIFEST
        content = read_value(EngineContent, manifest.content, path)
        for name in content.engine_files:
            if name not in manifest.files or name in _READ_BY_OTHERS:
                raise IntegrityError(f"{path}: {name!r} cannot be an engine's file: build the engine again")
        if "graph" not in manifest.parents:
            raise IntegrityError(f"{path} does not say which graph it was built from: build the engine again")
        left = frozenset(content.engine_files)
        small = verify_files(folder, manifest, leave_out=left, keep=(SCALES_FILE, TIMESTEPS_FILE))
        scales = scale_table_from_bytes(small[SCALES_FILE], folder / SCALES_FILE)
        check_quantizers(scales.quantizers, content.quantizers, path)
        engine = Engine(
            **vars(content),
            folder=folder,
            manifest=manifest,
            scales=scales,
            timesteps=timestep_table_from_bytes(small[TIMESTEPS_FILE], folder / TIMESTEPS_FILE),
        )
        if content.boundary_ratio is None:
            return engine
        return replace(engine, low_noise=engine._open_low_noise())

    def _open_low_noise(self) -> Engine:
        """Opens the engine inside; raises as :meth:`open`."""
        parent, place = self.manifest.parents.get(LOW_NOISE), self.folder / LOW_NOISE
        if parent is None or parent.path != LOW_NOISE or not (place / MANIFEST).exists():
            raise IntegrityError(f"{self.folder} lacks the engine that it was joined with: join them again")
        inside = Engine.open(place)
        if inside.manifest.digest != parent.digest:  # of the very manifest that was read
            raise IntegrityError(f"{place} is not the engine that {self.folder} was joined with: join them again")
        try:
            inside.check_follows(self, self.boundary)
        except InputError as error:
            raise IntegrityError(f"{self.folder}: {error}") from error
        return inside

    def check_follows(self, engine: Engine, boundary: float) -> None:
        """Checks that this engine may run another one's timesteps below ``boundary``, with the same inputs.

        Raises:
            InputError: it may not; the message says what is different.
        """
        for one in (self, engine):
            if CONTROL_FILE in one.manifest.files:
                raise InputError(f"{one.folder} is an engine of a ControlNet: join engines of denoisers")
        if self.boundary_ratio is not None:
            raise InputError(f"{self.folder} is joined already: give the engine that it was joined with")
        if self.manifest.base.digest != engine.manifest.base.digest:
            raise InputError(f"{self.folder} and {engine.folder} are of two pipelines: join engines of one")
        first, last = engine.timesteps.covered[0], min(engine.timesteps.covered[1], boundary)
        own = self.timesteps.covered
        if own[0] > first or own[1] < last:
            raise InputError(
                f"{self.folder} runs the timesteps {own[0]:g} to {own[1]:g}, not all from {first:g} to {last:g}:"
                " calibrate it for them"
            )
        reach = any(spec.name == IMAGE_REACH for spec in self.inputs)  # which engines without quantizers leave out
        ours, theirs = self._called_with(reach=reach), engine._called_with(reach=reach)
        other = next((name for name in ours if ours[name] != theirs[name]), None)
        if other is not None:
            raise InputError(
                f"{self.folder} has other {other} than {engine.folder}: export and build both with the same options"
                " (--batch too, which follows from the memory that is free)"
            )

    def _called_with(self, *, reach: bool) -> dict[str, object]:
        """Lists what must be equal for engines that take each other's calls, by what it is called."""
        shapes = {spec.name: spec.shape for spec in self.inputs if is_optional(spec.name)}
        if not reach:
            shapes.pop(IMAGE_REACH, None)
        packed = [spec for spec in self.inputs if spec.name in BOUND_MATRICES]
        of_text = ("encoder_hidden_states", "text_projections")
        tokens = [spec.shape[1] for spec in self.inputs if spec.name in of_text]
        slots = () if self.images is None else tuple(replace(slot, quantizer=None) for slot in self.images.layers)
        return {
            "batch or picture sizes": self.profile,
            "numbers of text tokens": tokens,
            "forms of the time table": self.takes_time_projections,
            "inputs for ControlNets or image prompts": (shapes, self.images and (self.images.tokens, slots)),
            "branches for LoRAs": (packed, self.lora),
            "devices": self.environment.get("device", "cpu"),
        }


@with_config(EXACT)
@dataclass(frozen=True)
class ComponentEngine:
    """One network: ``files`` are the backend's, the model first; ``config`` is its component's configuration."""

    files: Annotated[tuple[Name, ...], Field(min_length=1, max_length=2)]
    input: TensorSpec
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=8)]
    config: dict[str, Any]


@with_config(OPEN)
@dataclass(frozen=True, kw_only=True)
class ComponentsContent:
    """The component engines' own part of their manifest.

    ``networks`` are text encoders by their component's name, ``vae_decoder`` and ``vae_encoder``. ``precision``,
    ``provider`` and ``optimization`` are those of their :class:`Execution`; ``environment`` is what must match to load
    them (library version, device); ``profile`` is that of engines which do not take any size.
    """

    backend: Name
    precision: Name
    provider: Name | None
    optimization: Name | None
    environment: dict[str, str]
    networks: Annotated[dict[Name, ComponentEngine], Field(min_length=1, max_length=8)]
    sizes: dict[str, Bytes]
    profile: ShapeProfile | None = None

    @model_validator(mode="after")
    def _check_files(self) -> ComponentsContent:
        files = [file for network in self.networks.values() for file in network.files]
        if len(set(files)) != len(files) or set(files) != set(self.sizes):
            raise ValueError("every file must have a size and be of one network")
        return self


@dataclass(frozen=True, kw_only=True)
class ComponentEngines(ComponentsContent):
    """The text encoders and the autoencoder of a pipeline as a backend runs them: a folder with every network's files.

    They are in floating point and made apart from the denoiser's engine, so that one set serves many of those.

    Example:
        >>> components = ComponentEngines.open(Path("build/components"))
        >>> with open_pipeline("build/engine", components=components) as opened:
        ...     type(opened.pipe.vae).__name__
        'EngineAutoencoder'
    """

    folder: Path
    manifest: Manifest

    @property
    def execution(self) -> Execution:
        """Precision, provider and optimization in one record."""
        return Execution(self.precision, self.provider, self.optimization)

    @staticmethod
    def open(folder: Path) -> ComponentEngines:
        """Reads the manifest and checks which files there are; the loader hashes the very bytes that it loads.

        Raises:
            InputError: there is no such artifact. IntegrityError: it is damaged.
        """
        manifest = read_manifest(folder, "ComponentEngines")
        content = read_value(ComponentsContent, manifest.content, folder / MANIFEST)
        if set(content.sizes) != set(manifest.files):
            raise IntegrityError(f"{folder / MANIFEST} does not describe every file: export the components again")
        verify_files(folder, manifest, leave_out=frozenset(content.sizes))
        return ComponentEngines(**vars(content), folder=folder, manifest=manifest)
