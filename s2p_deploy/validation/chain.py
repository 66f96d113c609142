"""An engine and everything that it was made from, found and verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.families import base_of
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import CalibratedModel, ExportedGraph, LatentDataset, parent_folder

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Engine


@dataclass(frozen=True)
class Chain:
    """An engine and everything it was made from. ``dataset`` is None for a model that was not calibrated on one."""

    engine: Engine
    graph: ExportedGraph
    calibrated: CalibratedModel
    dataset: LatentDataset | None
    base: BasePipeline
    recipe: Recipe

    @property
    def guidance_scale(self) -> float:
        """Returns the deployed guidance scale."""
        return self.recipe.sampling.guidance(self.base.default_guidance)

    @property
    def folders(self) -> dict[str, Path]:
        """Returns the folders of its parts, by what they are called."""
        folders = {"engine": self.engine.folder, "graph": self.graph.folder, "calibrated model": self.calibrated.folder}
        dataset = {} if self.dataset is None else {"dataset": self.dataset.folder}
        return folders | dataset | {"pipeline": self.base.folder}

    @property
    def half(self) -> bool:
        """True where the engine computes what is not INT8 in half precision."""
        return self.engine.dtype == "fp16" or self.engine.precision != "f32"


def open_chain(
    engine: Engine, *, graph: Path | None = None, calib: Path | None = None, model: str | None = None
) -> Chain:
    """Finds and verifies what an engine was made from, where the manifests say that it was or at the folders given.

    Raises:
        InputError: something is not there. IntegrityError: what is there is something else.
    """
    exported = ExportedGraph.open(parent_folder(engine.folder, engine.manifest, "graph", graph))
    calibrated = CalibratedModel.open(parent_folder(exported.folder, exported.manifest, "calib", calib))
    with_dataset = "dataset" in calibrated.manifest.parents
    dataset = (
        LatentDataset.open(parent_folder(calibrated.folder, calibrated.manifest, "dataset")) if with_dataset else None
    )
    base = base_of(engine.manifest, model)
    return Chain(
        engine, exported, calibrated, dataset, base, recipe_from_data(engine.manifest.recipe, str(engine.folder))
    )
