"""Recipes of baselines and ablations: the product's sections, with the keys that only comparisons need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from s2p_deploy.recipe import (
    Dataset,
    Mixed,
    Recipe,
    Scales,
    Training,
    Transforms,
    checked_recipe,
    recipe_data,
    shipped_recipes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class ResearchMixed(Mixed):
    """Mixed precision, and low-bit weights.

    ``low_bit`` gives weights of the rules' INT4 layers BitsFusion's 3, 5 or 9 levels, as few as keep a layer's own
    error under the threshold that makes the average ``low_bit`` bits (arXiv 2406.04333, section 3.3).
    """

    low_bit: float | None = Field(None, gt=1.5, le=4)


class ResearchTransforms(Transforms):
    """Rewrites of the denoiser.

    ``smoothing``: linear inputs divided per channel by max|X|^alpha / max|W|^(1-alpha) (SmoothQuant, arXiv 2211.10438).
    ``low_rank``: rank of a floating-point branch beside every linear (SVDQuant, arXiv 2411.05007). ``time_layers``:
    ``quantized`` makes the time table from time layers quantized like the rest, as a pipeline without precalculation
    has them.
    """

    smoothing: float | None = Field(None, ge=0, le=1)
    low_rank: int = Field(0, ge=0)
    time_layers: Literal["exact", "quantized"] = "exact"


class ResearchScales(Scales):
    """Starting scales of weights and activations.

    ``timesteps``: one activation scale per timestep (``each``), or those scales collapsed to one.
    ``zero_point``: asymmetric activations. ``progressive``: a timestep's latents come from trajectories whose earlier
    calls are quantized already, and the share ``relaxed`` of timesteps nearest the picture has 10-bit activations (PCR,
    arXiv 2311.06322). No engine has zero points or 10 bits.
    """

    timesteps: Literal["each", "max", "mean", "min"] = "each"
    zero_point: bool = False
    progressive: bool = False
    relaxed: float = Field(0.0, ge=0, le=1)


class ResearchDataset(Dataset):
    """Algorithm 1.

    ``timesteps``: stored calls are drawn uniformly, or ``normal`` with mean 0.4 T and deviation 0.25 T towards the
    picture (PTQ4DM, arXiv 2211.15736).
    """

    timesteps: Literal["uniform", "normal"] = "uniform"


class ResearchTraining(Training):
    """Training.

    ``order``: ``mixed`` batches of all timesteps (S2P), or ``serial``: one timestep per iteration, from noise to
    picture, over and over. ``loss`` also weighs a sample's squared error by how far an error of its timestep moves the
    last latents under the schedule (``sampler``), or as measured through the network (``trajectory``); ``guided`` is
    the timestep-balanced error of the guided output, both branches in the batch.
    """

    order: Literal["mixed", "serial"] = "mixed"
    # Wider than the product's: a research recipe is never given to the product's own parser.
    loss: Literal["timestep_balanced", "uniform", "sampler", "trajectory", "guided"] = "timestep_balanced"  # type: ignore[assignment]


class ResearchRecipe(Recipe):
    """A whole recipe of a comparison, resolved."""

    mixed: ResearchMixed = ResearchMixed()
    transforms: ResearchTransforms = ResearchTransforms()
    scales: ResearchScales = ResearchScales()
    dataset: ResearchDataset
    training: ResearchTraining

    @staticmethod
    def load(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> ResearchRecipe:
        """Reads a recipe of this package or of the product by name, or a YAML file by path, as the product does.

        Raises:
            InputError: there is no such recipe, it is not valid YAML, or a key or value is wrong.
        """
        name = str(name_or_path)
        return checked_recipe(recipe_data(name, _shipped(), overrides), name, ResearchRecipe)

    @property
    def not_deployable(self) -> str:
        """Lists what no engine can run of the recipe; empty where a product recipe gives the same kind of model."""
        reasons = {
            "activations with zero points": self.scales.zero_point,
            "10-bit activations": self.scales.relaxed > 0,
            "low-rank branches": self.transforms.low_rank > 0,
            "weights of 3, 5 or 9 levels": self.mixed.low_bit is not None,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)


def is_product_recipe(recipe: ResearchRecipe) -> bool:
    """Tells a recipe that has none of this package's keys but at their defaults."""
    sections = (recipe.mixed, recipe.transforms, recipe.scales, recipe.dataset, recipe.training)
    product: tuple[type[BaseModel], ...] = (Mixed, Transforms, Scales, Dataset, Training)
    for section, kind in zip(sections, product, strict=True):
        for name, field in type(section).model_fields.items():
            if name not in set(kind.__annotations__) and getattr(section, name) != field.default:
                return False
    return recipe.training.loss in {"timestep_balanced", "uniform"}


def recipe_names() -> list[str]:
    """Lists the recipes of this package."""
    return sorted(shipped_recipes("s2p_research"))


def _shipped() -> dict[str, Any]:
    return shipped_recipes("s2p_deploy") | shipped_recipes("s2p_research")
