"""Trains the feature classifier on rendered pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scenes import training_scenes
from text_encoders import layout
from training import Schedule, train

from s2p_deploy.shapes.classifier import SceneClassifier

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SCENES, BATCH = 20_000, 64
SCHEDULE = Schedule(iterations=1_500, peak=2e-3, warmup=100, ema=0.99)


def train_classifier(folder: Path) -> SceneClassifier:
    """Trains (or goes on with) the classifier; pictures get a little noise, as a decoder's pictures have."""
    torch.manual_seed(0)
    net = SceneClassifier().train()
    pictures, captions = training_scenes(SCENES, seed=2)
    answers = torch.tensor([layout(text) for text in captions])

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        images = pictures[chosen].float() / 255
        logits = net(images + 0.02 * torch.randn(images.shape, generator=generator))
        losses = [
            torch.nn.functional.cross_entropy(part, answers[chosen, index], ignore_index=-1)
            for index, part in enumerate(logits)
        ]
        return torch.stack(losses).sum()

    net.load_state_dict(train(net, loss_of, SCHEDULE, folder / "classifier.safetensors"))
    return net.eval()
