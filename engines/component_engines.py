"""Text encoders and autoencoder of a pipeline on a backend: exported, written as an artifact, and loaded from it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from dataclasses import replace as with_changes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.context import Context
from s2p_deploy.engines.backend import resolve_execution, usable_backend
from s2p_deploy.engines.load import check_environment
from s2p_deploy.engines.options import shape_at
from s2p_deploy.errors import InputError, IntegrityError, S2PError
from s2p_deploy.records import Execution, ShapeProfile, Span, TensorSpec, check_vacant, write_artifact
from s2p_deploy.records.artifacts import copy_verified, read_verified
from s2p_deploy.records.engine import ComponentEngines
from s2p_deploy.records.files import check_room

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx_ir as ir

    from s2p_deploy.context import Progress
    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.engines.options import Shapes
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records.engine import ComponentEngine

KIND = "ComponentEngines"
# of engines that have a profile; larger batches are computed in slices, because a decoder's memory grows with its batch
_BATCHES = ShapeProfile(1, 1, 4)
_TOKENS = Span(2, 256, 512)  # where they are open, as T5's: Stable Diffusion 3's pipeline gives it 256


def build_component_engines(  # noqa: PLR0913 - as build_engine's, all but two by keyword
    base: BasePipeline,
    out: Path,
    *,
    backend: str,
    execution: Execution | None = None,
    profile: ShapeProfile | None = None,
    replace: bool = False,
    context: Context = Context(),
) -> ComponentEngines:
    """Writes a pipeline's text encoders and autoencoder for a backend, in floating point, one network after the other.

    CPU backends get float32 networks for batches and pictures of any size. TensorRT's plans are in float16 with the
    exceptions that :func:`s2p_deploy.families.components.load_component` names, or in float32 with the precision
    ``f32``; TensorRT-RTX builds them without a GPU.

    Args:
        base: the pipeline.
        out: folder of the artifact.
        backend: as for :func:`s2p_deploy.engines.build_engine`.
        execution: how they run (None: the backend's defaults).
        profile: of TensorRT's plans: batches (larger ones are computed in slices), and heights and widths of latents,
            not given those that the denoiser was trained on (None: batches of 1 to 4, tuned for 1).
        replace: whether an artifact at ``out`` may be replaced.
        context: its ``progress`` is told about every tensor written.

    Raises:
        InputError: ``out`` exists, its disk has no room, the backend does not run so, or a network is of a class that
            is not supported.
        MissingEnvironmentError: the backend's library is missing, or it builds on a GPU alone and there is none.
        EngineBuildError: TensorRT failed or crashed; the message ends with its log.
    """
    from s2p_deploy.families.components import component_networks

    check_vacant(out, KIND, replace=replace, inputs={"pipeline": base.folder})
    chosen = usable_backend(backend)
    requested, able = execution or Execution(), chosen.capabilities()
    dtype = "fp32" if "fp32" in able.dtypes or requested.precision == "f32" else "fp16"
    resolved = resolve_execution(chosen, requested, dtype)
    if able.any_size and profile is not None:
        raise InputError(f"{backend} takes batches and pictures of any size: leave --batch, --height and --width out")
    spans = None if able.any_size else _with_trained_size(base, profile or _BATCHES)
    check_room(out, 2 * _weight_bytes(base))

    def fill(folder: Path) -> dict[str, Any]:
        networks, environment = {}, {}
        for name in component_networks(base):
            with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
                file = Path(scratch) / f"{name}.onnx"
                described = _write_onnx(base, name, dtype, file, context.progress)
                shapes = {} if spans is None else _shapes(described, spans)
                written = chosen.write_network(file, folder, shapes, resolved, context.device)
            networks[name] = described | {"files": list(written.files)}
            environment = written.environment
        about: dict[str, Any] = {"backend": backend, **asdict(resolved), "environment": environment}
        if spans is not None:
            about["profile"] = spans.to_json()
        return about | {"networks": networks, "sizes": {path.name: path.stat().st_size for path in folder.iterdir()}}

    write_artifact(out, kind=KIND, base=base.base, recipe={}, fill=fill, replace=replace)
    return ComponentEngines.open(out)


def load_component_engines(engines: ComponentEngines, device: str = "auto") -> dict[str, Runner]:
    """Loads a runner of every network, by name, on the GPU of a context's ``device`` where they are for one.

    The bytes that are loaded are those that were hashed.

    Raises:
        IntegrityError: a file was changed, or is none that the backend reads.
        MissingEnvironmentError: the library or a device is missing, or the library is of another version.
        InputError: there is no such backend.
    """
    backend = usable_backend(engines.backend)
    check_environment(engines, backend, device)
    with ExitStack() as opened:  # one that cannot be loaded leaves none open
        runners = {
            name: opened.enter_context(_loaded(engines, backend, network, device))
            for name, network in engines.networks.items()
        }
        opened.pop_all()
    return runners


def copy_networks(engines: ComponentEngines, names: Sequence[str], out: Path) -> None:
    """Writes an artifact of some networks of component engines, byte by byte: what one component of a pipeline needs.

    Raises:
        InputError: ``out`` exists, or its disk has no room.
        IntegrityError: a file was changed since the component engines were opened.
    """
    content = engines.manifest.content
    files = [file for name in names for file in engines.networks[name].files]
    if out.exists():
        raise InputError(f"{out} exists: choose another folder")
    check_room(out, sum(engines.sizes[file] for file in files), "choose another folder")

    def fill(folder: Path) -> dict[str, Any]:
        for file in files:
            copy_verified(engines, file, folder / file)
        return content | {
            "networks": {name: content["networks"][name] for name in names},
            "sizes": {file: engines.sizes[file] for file in files},
        }

    parents = {"components": (engines.folder, engines.manifest)}
    write_artifact(out, kind=KIND, base=engines.manifest.base, recipe={}, fill=fill, parents=parents)


def _with_trained_size(base: BasePipeline, profile: ShapeProfile) -> ShapeProfile:
    """Gives a profile the size of latents that the denoiser was trained on, where it names none."""
    from s2p_deploy.families import latent_shape_of

    _, height, width = latent_shape_of(base.denoiser_config())
    return with_changes(
        profile,
        height=profile.height or Span(height, height, height),
        width=profile.width or Span(width, width, width),
    )


def _shapes(described: dict[str, Any], profile: ShapeProfile) -> Shapes:
    """Returns the smallest, tuned-for and largest shape of a network's input, whose open sizes have these names."""
    from s2p_deploy.families.components import pixels_per_latent

    spec = TensorSpec(described["input"]["name"], "", tuple(described["input"]["shape"]))
    config, shapes = described["config"], []
    for end in ("minimum", "optimum", "maximum"):
        sizes = profile.sizes(end) | {"tokens": getattr(_TOKENS, end)}
        if "block_out_channels" in config:
            factor = pixels_per_latent(config)
            sizes |= {f"{factor}*{side}": factor * sizes[side] for side in ("height", "width")}
        shapes.append(shape_at(spec, sizes))
    smallest, tuned, largest = shapes
    return {spec.name: (smallest, tuned, largest)}


def _write_onnx(base: BasePipeline, name: str, dtype: str, file: Path, progress: Progress) -> dict[str, Any]:
    """Exports one network; returns what the manifest says of it. PyTorch's weights are freed when it returns."""
    import torch

    from s2p_deploy.export.float_networks import component_model
    from s2p_deploy.export.tensors import write_model
    from s2p_deploy.families.components import load_component

    component = load_component(base, name, torch.float16 if dtype == "fp16" else torch.float32)
    model = component_model(component, name)
    (given,), made = _specs(model.graph.inputs), _specs(model.graph.outputs)
    write_model(model, file, progress, f"write {file.stem}")
    return {"input": given, "outputs": made, "config": component.config}


def _specs(values: Iterable[ir.Value]) -> list[dict[str, Any]]:
    """Name, type and shape, JSON-ready; sizes that vary have names."""
    specs = []
    for value in values:
        assert value.dtype is not None, "traced with its type"
        assert value.shape is not None, "traced with its shape"
        shape = [size if isinstance(size, int) else str(size) for size in value.shape]
        specs.append({"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape})
    return specs


def _weight_bytes(base: BasePipeline) -> int:
    """Sums the networks besides the denoiser as the pipeline stores them: half of what is written, where in float16."""
    folders = {path.parent for path in base.folder.glob("*/*.safetensors")} - {base.denoiser_folder}
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def _loaded(engines: ComponentEngines, backend: Backend, network: ComponentEngine, device: str) -> Runner:
    files = {name: read_verified(engines, name) for name in network.files}
    try:
        return backend.load_network(files, engines.execution, device)
    except S2PError:
        raise
    except Exception as error:  # the runtimes' errors have no class of their own in common
        path = engines.folder / network.files[0]
        raise IntegrityError(
            f"{path} cannot be loaded ({type(error).__name__}): build the component engines again"
        ) from error
