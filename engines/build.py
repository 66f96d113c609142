"""ExportedGraph -> Engine: prepare and compile in a child process, then one artifact."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.backend import check_hint, check_refit, usable_backend
from s2p_deploy.engines.isolation import Limits, run_child
from s2p_deploy.engines.model_card import CARD, engine_card
from s2p_deploy.engines.options import BuildOptions
from s2p_deploy.engines.preflight import check_resources, estimate
from s2p_deploy.engines.probe.run import ensure_probed
from s2p_deploy.engines.profile_shapes import profile_for
from s2p_deploy.engines.trial import remembered
from s2p_deploy.engines.verified_bytes import copy_verified
from s2p_deploy.errors import InputError
from s2p_deploy.progress import Progress, silent
from s2p_deploy.records import Engine, check_vacant, write_artifact
from s2p_deploy.records.exported_graph import CONDITIONING_FILE, TEXT_FILE

if TYPE_CHECKING:
    from s2p_deploy.records import ExportedGraph

CHILD = "s2p_deploy.engines.child"
TIMEOUT_S = 3600.0


def build_engine(  # noqa: PLR0913 - a build has these arguments, all but three by keyword
    graph: ExportedGraph,
    backend: str,
    out: Path,
    *,
    options: BuildOptions | None = None,
    replace: bool = False,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> Engine:
    """Builds the engine of a graph and writes it to ``out``. A build that fails leaves nothing behind.

    Args:
        graph: what to build from; fp16 for the TensorRT kinds.
        backend: onnxruntime, openvino, tensorrt_rtx or tensorrt.
        out: folder of the new artifact.
        options: hint, batch sizes, lowering (None: the defaults).
        replace: whether an artifact at ``out`` may be replaced; it stays until the new one is whole.
        limits: of the build's child process: seconds of wall time and bytes of private memory.
        progress: told when the build starts and ends.

    Raises:
        InputError: an argument is wrong, ``out`` exists, or the graph's type is not the backend's.
        MissingEnvironmentError: the backend's library, memory or disk is missing.
        EngineBuildError: the backend failed or crashed; the message ends with its log.

    Before the first build with a version of which it is not known what it takes, small patterns are built to learn it.
    """
    limits = limits or Limits(TIMEOUT_S)
    asked = check_build(graph, backend, out, options or BuildOptions(), limits, replace=replace)
    if any(site.weight is not None for site in graph.sites):
        ensure_probed(backend, progress)

    def fill(folder: Path) -> dict[str, Any]:
        progress("build", 0, 1)
        built = _built_in_child(graph, backend, folder, asked, limits)
        _copy_tables(graph, folder)
        progress("build", 1, 1)
        sizes = {name: (folder / name).stat().st_size for name in built["engine_files"]}
        content = built | _described(graph, backend, asked) | {"sizes": sizes}
        (folder / CARD).write_text(engine_card(graph, content), encoding="utf-8")
        return content

    write_artifact(
        out,
        kind="Engine",
        base=graph.manifest.base,
        recipe=graph.manifest.recipe,
        fill=fill,
        parents={"graph": (graph.folder, graph.manifest)},
        replace=replace,
    )
    return remembered(Engine.open(out))


def check_build(
    graph: ExportedGraph, backend: str, out: Path, options: BuildOptions, limits: Limits, *, replace: bool
) -> BuildOptions:
    """Refuses what :func:`build_engine` would refuse before any work; returns the options with their hint.

    Raises:
        InputError: an argument is wrong, ``out`` exists, or the graph's type is not the backend's.
        MissingEnvironmentError: the backend's library, memory or disk is missing.
    """
    chosen = usable_backend(backend)
    dtypes = chosen.capabilities().dtypes
    if graph.dtype not in dtypes:
        raise InputError(
            f"{backend} builds from {' or '.join(dtypes)} graphs, {graph.folder} is {graph.dtype}: export it again"
        )
    check_vacant(out, replace=replace)
    profile = profile_for(graph, options.profile)
    asked = dataclasses.replace(options, hint=check_hint(chosen, options.hint), profile=profile)
    check_refit(chosen, asked)
    check_resources(estimate(graph, backend), out.parent, limits.memory)
    return asked


def _copy_tables(graph: ExportedGraph, folder: Path) -> None:
    for name in graph.manifest.files:
        side_graph = name.startswith((CONDITIONING_FILE, TEXT_FILE))
        if side_graph or name in {"act_scales.safetensors", "timesteps.json"}:
            copy_verified(graph, name, folder / name)


def _built_in_child(
    graph: ExportedGraph, backend: str, folder: Path, options: BuildOptions, limits: Limits
) -> dict[str, Any]:
    # beside the artifact: what the backend keeps of the prepared graph is renamed, not copied
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.scratch-", dir=folder.parent) as scratch:
        request = {
            "graph": str(graph.folder.resolve()),
            "backend": backend,
            "options": dataclasses.asdict(options),
            "folder": str(folder.resolve()),
            "scratch": scratch,
        }
        return run_child(CHILD, request, Path(scratch), limits)


def _described(graph: ExportedGraph, backend: str, options: BuildOptions) -> dict[str, Any]:
    return {
        "backend": backend,
        "hint": options.hint,
        "options": dataclasses.asdict(options),
        "dtype": graph.dtype,
        "profile": options.profile.to_json(),
        "outputs": [dataclasses.asdict(spec) for spec in graph.outputs],
        "points": graph.manifest.content["points"],
        "added_cond": graph.manifest.content.get("added_cond", 0),
        "denoiser_config": graph.manifest.content["denoiser_config"],
    }
