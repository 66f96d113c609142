"""PipelineParts: the text encoders and the autoencoder of a pipeline, as a backend runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.exported_graph import TensorSpec
from s2p_deploy.records.json_forms import NetworkForm, PartsContent
from s2p_deploy.records.manifest import MANIFEST, Manifest, read_manifest, verify_files
from s2p_deploy.records.strict import checked

if TYPE_CHECKING:
    from pathlib import Path

KIND = "PipelineParts"


@dataclass(frozen=True)
class PartNetwork:
    """One network: ``files`` are the backend's, the model first; ``config`` is its component's configuration."""

    files: tuple[str, ...]
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class PipelineParts:
    """A folder with the files of every network.

    ``networks`` are text encoders by their component's name, ``vae_decoder`` and ``vae_encoder``. ``hint`` is the
    precision hint they run with; ``environment`` what must match to load them (library version, device).
    """

    folder: Path
    manifest: Manifest
    backend: str
    hint: str
    environment: dict[str, str]
    networks: dict[str, PartNetwork]

    @staticmethod
    def open(folder: Path) -> PipelineParts:
        """Reads the manifest and looks which files there are; the loader hashes the very bytes that it loads.

        Raises:
            InputError: there is no such artifact. IntegrityError: it is damaged.
        """
        manifest = read_manifest(folder, KIND)
        form = checked(PartsContent, manifest.content, folder / MANIFEST)
        if set(form.sizes) != set(manifest.files):
            raise IntegrityError(f"{folder / MANIFEST} does not describe every file: export the parts again")
        verify_files(folder, manifest, leave_out=frozenset(form.sizes))
        networks = {name: _network(network) for name, network in form.networks.items()}
        return PipelineParts(folder, manifest, form.backend, form.hint, form.environment, networks)


def _network(form: NetworkForm) -> PartNetwork:
    given, *made = (TensorSpec(t.name, t.dtype, tuple(t.shape)) for t in (form.input, *form.outputs))
    return PartNetwork(tuple(form.files), given, tuple(made), form.config)
