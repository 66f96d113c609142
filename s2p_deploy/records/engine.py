"""Engine: what a backend made of an exported graph, and what it reports of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.records.exported_graph import TensorSpec
from s2p_deploy.records.manifest import Manifest, read_manifest, verify_files
from s2p_deploy.records.scale_table import ScaleTable, read_scale_table
from s2p_deploy.records.timestep_table import TimestepTable, read_timestep_table

if TYPE_CHECKING:
    from pathlib import Path


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

    @staticmethod
    def open(folder: Path) -> Engine:
        """Reads and verifies all but the engine files: the backend's ``load`` hashes the very bytes it loads."""
        manifest = read_manifest(folder, "Engine")
        content = manifest.content
        verify_files(folder, manifest, leave_out=frozenset(content["engine_files"]))
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
            scales=read_scale_table(folder / "act_scales.safetensors"),
            timesteps=read_timestep_table(folder / "timesteps.json"),
        )
