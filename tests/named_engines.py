"""One small ONNX Runtime engine under several recipes' names: measured alike, whatever they say."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines import BuildOptions, build_engine
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, write_artifact
from tests.engines.small_graph import small_graph

if TYPE_CHECKING:
    from pathlib import Path


class NamedEngines:
    """Engines of the small graph in ``folder``. Not to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.graph = small_graph(folder / "graph")

    def __call__(self, recipe: str, optimization: str) -> Engine:
        """The engine of an optimization that says it is of a recipe; built when first asked for."""
        out = self.folder / f"{recipe}-{optimization}"
        if not out.exists():
            self._write(out, recipe, self._built(optimization))
        return Engine.open(out)

    def _built(self, optimization: str) -> Engine:
        out = self.folder / optimization
        if out.exists():
            return Engine.open(out)
        return build_engine(self.graph, out, backend="onnxruntime", options=BuildOptions(optimization=optimization))

    def _write(self, out: Path, recipe: str, source: Engine) -> None:
        def fill(place: Path) -> dict[str, Any]:
            for name in source.manifest.files:
                shutil.copyfile(source.folder / name, place / name)
            return source.manifest.content

        resolved = Recipe.load(recipe).model_dump(mode="json")
        parents = {"graph": (self.graph.folder, self.graph.manifest)}
        write_artifact(out, kind="Engine", base=source.manifest.base, recipe=resolved, fill=fill, parents=parents)
