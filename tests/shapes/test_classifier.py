from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch

from s2p_deploy.shapes.classifier import ANSWERS, load_classifier
from s2p_deploy.shapes.scenes import COLOURS, PLACES, render, sample_scene

FILE = Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline" / "classifier.safetensors"))


def test_tells_the_colour_at_every_place_of_rendered_scenes() -> None:
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng, held_out=False) for _ in range(100)]
    pictures = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits = load_classifier(FILE)(pictures)
    right = asked = 0
    for number, scene in enumerate(scenes):
        by_place = {item.place: item for item in scene.objects}
        for index, place in enumerate(PLACES):
            wanted = 1 + COLOURS.index(by_place[place].colour) if place in by_place else 0
            right += int(logits[3 * index][number].argmax()) == wanted
            asked += 1
    assert right / asked > 0.97


def test_features_are_64_numbers_and_answers_cover_the_scene() -> None:
    classifier = load_classifier(FILE)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert classifier.features(pictures).shape == (2, 64)
        assert [part.shape[1] for part in classifier(pictures)] == list(ANSWERS)
