"""Engine: what a backend made of an exported graph, and what it reports of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.records.exported_graph import TensorSpec
from s2p_deploy.records.json_forms import EngineContent, check_engine
from s2p_deploy.records.manifest import MANIFEST, Manifest, read_manifest, verify_files
from s2p_deploy.records.scale_table import ScaleTable, scale_table_from_bytes
from s2p_deploy.records.strict import checked
from s2p_deploy.records.timestep_table import TimestepTable, timestep_table_from_bytes

if TYPE_CHECKING:
    from pathlib import Path

_SCALES, _TIMESTEPS = "act_scales.safetensors", "timesteps.json"


@dataclass(frozen=True)
class SitePrecision:
    """One site. ``compute`` is what the backend reports (int8, f32, fp16, ...) or ``unknown``, never a claim."""

    site: str
    op: str
    lowering: str
    weight_storage_bits: int
    activation_bits: int
    compute: str


@dataclass(frozen=True)
class Engine:
    """A folder with the backend's file(s) (``engine_files``), ``act_scales.safetensors`` and ``timesteps.json``.

    Where the projected time features are an input, ``conditioning.onnx`` computes them, and where the products of the
    text are, ``text.onnx``, as in the exported graph.
    ``hint`` is the precision hint it was built with; ``environment`` what must match to load it (library version,
    device, compute capability); ``denoiser_config`` what a diffusers pipeline reads from its denoiser.
    """

    folder: Path
    manifest: Manifest
    backend: str
    hint: str
    dtype: Literal["fp32", "fp16"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: tuple[SitePrecision, ...]
    engine_files: tuple[str, ...]
    environment: dict[str, str]
    denoiser_config: dict[str, Any]
    scales: ScaleTable
    timesteps: TimestepTable

    @property
    def added_width(self) -> int:
        """Width of what the projected time features depend on besides the timestep (``added_cond``)."""
        return int(self.manifest.content.get("added_cond", 0))

    @property
    def takes_time_projections(self) -> bool:
        """Whether the projected time features are an input: rows of any schedule can be bound."""
        return any(spec.name == "time_projections" for spec in self.inputs)

    @property
    def takes_text_projections(self) -> bool:
        """Whether the products of the text are an input, in the place of the text."""
        return any(spec.name == "text_projections" for spec in self.inputs)

    @staticmethod
    def open(folder: Path) -> Engine:
        """Reads and verifies all but the engine files: the backend's ``load`` hashes the very bytes it loads."""
        manifest = read_manifest(folder, "Engine")
        content, path = manifest.content, folder / MANIFEST
        form = checked(EngineContent, content, path)
        small = verify_files(folder, manifest, leave_out=frozenset(form.engine_files), keep=(_SCALES, _TIMESTEPS))
        scales = scale_table_from_bytes(small[_SCALES], folder / _SCALES)
        check_engine(form, manifest.files, manifest.parents, scales.points, path)
        return Engine(
            folder,
            manifest,
            content["backend"],
            content["hint"],
            content["dtype"],
            inputs=tuple(TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in content["inputs"]),
            outputs=tuple(TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in content["outputs"]),
            sites=tuple(SitePrecision(**item) for item in content["sites"]),
            engine_files=tuple(content["engine_files"]),
            environment=content["environment"],
            denoiser_config=content["denoiser_config"],
            scales=scales,
            timesteps=timestep_table_from_bytes(small[_TIMESTEPS], folder / _TIMESTEPS),
        )
