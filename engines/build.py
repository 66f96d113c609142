"""ExportedGraph -> Engine: prepare and compile in a child process, then one artifact."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.backend import ShapeProfile, check_hint, usable_backend
from s2p_deploy.engines.isolation import Limits, run_child
from s2p_deploy.engines.preflight import check_resources, estimate
from s2p_deploy.errors import InputError
from s2p_deploy.progress import Progress, silent
from s2p_deploy.records import Engine, write_artifact

if TYPE_CHECKING:
    from s2p_deploy.records import ExportedGraph

CHILD = "s2p_deploy.engines.child"
TIMEOUT_S = 3600.0


def build_engine(  # noqa: PLR0913 - a build has these options, all but three by keyword
    graph: ExportedGraph,
    backend: str,
    out: Path,
    *,
    hint: str | None = None,
    profile: ShapeProfile | None = None,
    replace: bool = False,
    timeout_s: float = TIMEOUT_S,
    memory_limit: int | None = None,
    progress: Progress = silent,
) -> Engine:
    """Builds the engine of a graph and writes it to ``out``. A build that fails leaves nothing behind.

    Args:
        graph: what to build from; fp16 for the TensorRT kinds.
        backend: onnxruntime, openvino, tensorrt_rtx or tensorrt.
        out: folder of the new artifact.
        hint: precision hint, one of the backend's (None: its default).
        profile: batch sizes (None: 1, tuned for 2, up to 32).
        replace: whether an artifact at ``out`` may be replaced; it stays until the new one is whole.
        timeout_s: seconds after which the build is stopped.
        memory_limit: bytes of private memory that the build may take.
        progress: told when the build starts and ends.

    Raises:
        InputError: an argument is wrong, ``out`` exists, or the graph's type is not the backend's.
        MissingEnvironmentError: the backend's library, memory or disk is missing.
        EngineBuildError: the backend failed or crashed; the message ends with its log.
    """
    chosen = usable_backend(backend)
    dtypes = chosen.capabilities().dtypes
    if graph.dtype not in dtypes:
        raise InputError(
            f"{backend} builds from {' or '.join(dtypes)} graphs, {graph.folder} is {graph.dtype}: export it again"
        )
    chosen_hint, shapes = check_hint(chosen, hint), profile or ShapeProfile()
    check_resources(estimate(graph), out.parent, memory_limit)
    limits = Limits(timeout_s, memory_limit)

    def fill(folder: Path) -> dict[str, Any]:
        progress("build", 0, 1)
        built = _built_in_child(graph, backend, folder, chosen_hint, shapes, limits)
        for name in ("act_scales.safetensors", "timesteps.json"):
            shutil.copyfile(graph.folder / name, folder / name)
        progress("build", 1, 1)
        sizes = {name: (folder / name).stat().st_size for name in built["engine_files"]}
        return built | _described(graph, backend, chosen_hint, shapes) | {"sizes": sizes}

    write_artifact(
        out,
        kind="Engine",
        base=graph.manifest.base,
        recipe=graph.manifest.recipe,
        fill=fill,
        parents={"graph": (graph.folder, graph.manifest)},
        replace=replace,
    )
    return Engine.open(out)


def _built_in_child(
    graph: ExportedGraph, backend: str, folder: Path, hint: str, profile: ShapeProfile, limits: Limits
) -> dict[str, Any]:
    # beside the artifact: what the backend keeps of the prepared graph is renamed, not copied
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.scratch-", dir=folder.parent) as scratch:
        request = {
            "graph": str(graph.folder.resolve()),
            "backend": backend,
            "hint": hint,
            "profile": list(astuple(profile)),
            "folder": str(folder.resolve()),
            "scratch": scratch,
        }
        return run_child(CHILD, request, Path(scratch), limits)


def _described(graph: ExportedGraph, backend: str, hint: str, profile: ShapeProfile) -> dict[str, Any]:
    return {
        "backend": backend,
        "hint": hint,
        "dtype": graph.dtype,
        "profile": asdict(profile),
        "inputs": [asdict(spec) for spec in graph.inputs],
        "outputs": [asdict(spec) for spec in graph.outputs],
        "points": graph.manifest.content["points"],
        "denoiser_config": graph.manifest.content["denoiser_config"],
    }
