"""The feature classifier of ``shapes`` pictures, which replaces Inception's features offline."""

from __future__ import annotations

import itertools
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from s2p_deploy.shapes.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES

if TYPE_CHECKING:
    from torch import Tensor

# Trained weights, bundled with the shapes pipeline.
CLASSIFIER = Path(str(resources.files("s2p_deploy"))) / "shapes" / "pipeline" / "classifier.safetensors"
FEATURES = 64
ANSWERS = (len(COLOURS) + 1, len(SHAPES), len(SIZES)) * len(PLACES) + (len(BACKGROUNDS),)


class SceneClassifier(torch.nn.Module):
    """A convolutional network from pictures [n, 3, 64, 64] in [0, 1] to 64 features and logits of every attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, FEATURES)
        stages: list[torch.nn.Module] = []
        for before, after in itertools.pairwise(widths):
            stages += [
                torch.nn.Conv2d(before, after, 4, stride=2, padding=1),
                torch.nn.GroupNorm(8, after),
                torch.nn.SiLU(),
            ]
        self.stem = torch.nn.Sequential(*stages)
        self.project = torch.nn.Linear(FEATURES * 16, FEATURES)
        self.answers = torch.nn.Linear(FEATURES, sum(ANSWERS))

    def features(self, pictures: Tensor) -> Tensor:
        """Computes features float32 [n, 64] of pictures float32 [n, 3, 64, 64] in [0, 1]."""
        return torch.nn.functional.silu(self.project(self.stem(pictures * 2 - 1).flatten(1)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Predicts logits of the attributes, in the order of :data:`ANSWERS`."""
        logits: tuple[Tensor, ...] = self.answers(self.features(pictures)).split(ANSWERS, dim=1)
        return logits


def load_classifier(file: Path) -> SceneClassifier:
    """Loads the trained classifier from a safetensors file."""
    classifier = SceneClassifier()
    classifier.load_state_dict(load_file(file))
    return classifier.eval()
