from __future__ import annotations

import math

import numpy as np
import pytest

from s2p_deploy.shapes.grammar import SHAPES, Scene, SceneObject
from s2p_deploy.shapes.renderer import BACKGROUND_RGB, COLOUR_RGB, coverage, render

SCENE = Scene((SceneObject("large", "red", "square", "top left"),), "gray")


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi * 10**2),
        ("square", (2 * 8.6) ** 2),
        ("triangle", 3 * math.sqrt(3) * 6.4**2),  # equilateral, inradius 6.4
    ],
)
def test_coverage_has_the_area_of_the_shape(shape: str, area: float) -> None:
    assert coverage(shape, 10.0, (32.0, 32.0)).sum() == pytest.approx(area, rel=0.02)


def test_the_three_shapes_look_equally_large() -> None:
    areas = [coverage(shape, 12.0, (32.0, 32.0)).sum() for shape in SHAPES]
    assert max(areas) < 2.2 * min(areas)


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        coverage("star", 5.0, (1.0, 1.0))


def test_colours_are_where_the_scene_says() -> None:
    picture = render(SCENE)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[17, 17], COLOUR_RGB["red"])
    np.testing.assert_array_equal(picture[50, 50], BACKGROUND_RGB["gray"])


def test_jitter_moves_objects_and_its_absence_centres_them() -> None:
    rng = np.random.default_rng(0)
    assert not np.array_equal(render(SCENE, rng), render(SCENE, rng))
    np.testing.assert_array_equal(render(SCENE), render(SCENE))
