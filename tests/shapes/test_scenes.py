from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2p_deploy.shapes.scenes import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    PLACES,
    SHAPES,
    Scene,
    SceneObject,
    all_objects,
    caption,
    coverage,
    distinct_captions,
    is_held_out,
    parse,
    render,
    sample_scene,
)

SCENE = Scene((SceneObject("large", "red", "square", "top left"),), "gray")
scenes = st.builds(
    lambda items, background: Scene(tuple(items), background),
    st.lists(st.sampled_from(all_objects()), min_size=1, max_size=2, unique_by=lambda item: item.place),
    st.sampled_from(BACKGROUNDS),
)


def test_caption_of_a_known_scene() -> None:
    scene = Scene(
        (SceneObject("large", "red", "circle", "top left"), SceneObject("small", "blue", "square", "bottom right")),
        "white",
    )
    assert caption(scene) == (
        "a large red circle at the top left and a small blue square at the bottom right, white background"
    )


@given(scenes)
def test_parse_is_the_inverse_of_caption(scene: Scene) -> None:
    assert parse(caption(scene)) == scene


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "a large red circle at the top left", "an odd a large red circle at the top left, white background"],
)
def test_foreign_text_is_no_caption(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_training_scenes_never_hold_a_held_out_combination() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng, held_out=False) for _ in range(2000)]
    assert not any(is_held_out(item) for scene in drawn for item in scene.objects)


def test_held_out_scenes_always_hold_one() -> None:
    rng = np.random.default_rng(0)
    assert all(any(map(is_held_out, sample_scene(rng, held_out=True).objects)) for _ in range(500))


def test_two_objects_stand_in_two_places() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        places = [item.place for item in sample_scene(rng, held_out=False).objects]
        assert len(set(places)) == len(places)


def test_the_grammar_is_as_large_as_promised() -> None:
    assert (len(all_objects()), len(PLACES), len(BACKGROUNDS)) == (144, 4, 3)
    assert sum(map(is_held_out, all_objects())) == 16


def test_distinct_captions_do_not_repeat() -> None:
    texts = list(itertools.islice(distinct_captions(np.random.default_rng(3), held_out=True), 200))
    assert len(set(texts)) == 200


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
