from __future__ import annotations

import numpy as np
import pytest

from s2p_deploy.shapes.checker import attribute_accuracy, read_picture, score_picture
from s2p_deploy.shapes.scenes import Scene, SceneObject, caption, render, sample_scene

COUNT = 400


@pytest.fixture(scope="module")
def rendered() -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(7)
    scenes = [sample_scene(rng, held_out=bool(i % 2)) for i in range(COUNT)]
    return [render(scene, rng) for scene in scenes], [caption(scene) for scene in scenes]


def test_reads_rendered_ground_truth(rendered: tuple[list[np.ndarray], list[str]]) -> None:
    assert attribute_accuracy(*rendered) >= 0.99


def test_reads_through_a_decoders_noise(rendered: tuple[list[np.ndarray], list[str]]) -> None:
    pictures, captions = rendered
    rng = np.random.default_rng(0)
    noisy = [np.clip(p + rng.normal(0, 12, p.shape), 0, 255).astype(np.uint8) for p in pictures]
    assert attribute_accuracy(noisy, captions) >= 0.98


def test_is_near_chance_on_shuffled_captions(rendered: tuple[list[np.ndarray], list[str]]) -> None:
    """Chance: background 1/3, count about 1/2, something at the place 0.4, and then 1/6, 1/3 and 1/2: 0.27 together."""
    pictures, captions = rendered
    shuffled = [captions[i] for i in np.random.default_rng(1).permutation(COUNT)]
    assert attribute_accuracy(pictures, shuffled) < 0.35


def test_score_counts_each_attribute_once() -> None:
    item = SceneObject("large", "red", "circle", "top left")
    asked = Scene((SceneObject("large", "blue", "circle", "top left"),), "white")
    score = score_picture(render(Scene((item,), "white")), asked)
    assert (score.right, score.total) == (5, 6)  # all but the colour


def test_an_extra_object_costs_the_count() -> None:
    first, second = (
        SceneObject("large", "red", "circle", "top left"),
        SceneObject("small", "cyan", "square", "bottom right"),
    )
    score = score_picture(render(Scene((first, second), "white")), Scene((first,), "white"))
    assert (score.right, score.total) == (5, 6)


def test_an_empty_picture_shows_its_background_alone() -> None:
    assert read_picture(np.full((64, 64, 3), 20, np.uint8)) == Scene((), "black")


def test_wrong_size_and_no_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        read_picture(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="at least one"):
        attribute_accuracy([], [])
