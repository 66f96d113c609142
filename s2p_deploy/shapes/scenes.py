"""Scenes of the bundled ``shapes`` pipelines: their captions, the held-out split, and their pictures.

A scene is one or two objects in distinct corners over a plain background. Every caption is written by :func:`caption`
and read back by :func:`parse`, so a picture can be judged against its prompt without a language model (see
:mod:`s2p_deploy.shapes.checker`). Pictures are 64x64 RGB, anti-aliased from signed distances, in numpy alone.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SIZES = ("large", "small")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("white", "gray", "black")

PICTURE_SIZE = 64
COLOUR_RGB = dict(
    zip(
        COLOURS,
        np.array([[220, 40, 40], [40, 170, 70], [45, 80, 225], [240, 215, 45], [150, 50, 190], [50, 205, 225]]),
        strict=True,
    )
)
BACKGROUND_RGB = dict(zip(BACKGROUNDS, np.array([[245, 245, 245], [140, 140, 140], [20, 20, 20]]), strict=True))
RADIUS = dict(zip(SIZES, (12.0, 7.0), strict=True))
CENTRES = dict(zip(PLACES, ((17.0, 17.0), (47.0, 17.0), (17.0, 47.0), (47.0, 47.0)), strict=True))
JITTER_PIXELS = 2.0

_TRIANGLE_NORMALS = ((0.0, 1.0), (0.75**0.5, -0.5), (-(0.75**0.5), -0.5))
_SQUARE_HALF_SIDE, _TRIANGLE_INRADIUS = 0.86, 0.64  # of the radius, so that the three shapes look equally large
_OBJECT = re.compile(rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})")
_BACKGROUND = re.compile(rf"({'|'.join(BACKGROUNDS)}) background$")


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object of a scene; each field is a word of the grammar."""

    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two objects in distinct places over a background, in the order in which the caption names them."""

    objects: tuple[SceneObject, ...]
    background: str


def caption(scene: Scene) -> str:
    """Writes the one caption of a scene, e.g. ``a small red circle at the top left, white background``."""
    parts = " and ".join(f"a {o.size} {o.colour} {o.shape} at the {o.place}" for o in scene.objects)
    return f"{parts}, {scene.background} background"


def parse(text: str) -> Scene:
    """Reads the scene from a caption, the inverse of :func:`caption`.

    Raises:
        ValueError: ``text`` is not a caption of the grammar.
    """
    background = _BACKGROUND.search(text)
    objects = tuple(SceneObject(*match) for match in _OBJECT.findall(text))
    if background is None or not objects:
        raise ValueError(f"not a caption of the shapes grammar: {text!r}")
    scene = Scene(objects, background.group(1))
    if caption(scene) != text:
        raise ValueError(f"not a caption of the shapes grammar: {text!r}")
    return scene


@cache
def all_objects() -> tuple[SceneObject, ...]:
    """Lists every object of the grammar (2 sizes x 6 colours x 3 shapes x 4 places = 144)."""
    return tuple(SceneObject(*words) for words in itertools.product(SIZES, COLOURS, SHAPES, PLACES))


def is_held_out(item: SceneObject) -> bool:
    """Returns True where this combination of words is kept out of all training pictures (one in eight)."""
    words = f"{item.size} {item.colour} {item.shape} {item.place}"
    return hashlib.sha256(words.encode()).digest()[0] % 8 == 0


def sample_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """Draws a random scene. With ``held_out`` one object is a held-out combination, otherwise none is."""
    train = [item for item in all_objects() if not is_held_out(item)]
    first_pool = [item for item in all_objects() if is_held_out(item)] if held_out else train
    first = first_pool[rng.integers(len(first_pool))]
    objects = [first]
    if rng.random() < 0.6:
        rest = [item for item in train if item.place != first.place]
        objects.append(rest[rng.integers(len(rest))])
        if rng.random() < 0.5:
            objects.reverse()
    return Scene(tuple(objects), BACKGROUNDS[rng.integers(len(BACKGROUNDS))])


def distinct_captions(rng: np.random.Generator, *, held_out: bool) -> Iterator[str]:
    """Yields endless captions of :func:`sample_scene`, each once."""
    seen: set[str] = set()
    while True:
        text = caption(sample_scene(rng, held_out=held_out))
        if text not in seen:
            seen.add(text)
            yield text


def coverage(shape: str, radius: float, centre: tuple[float, float]) -> NDArray[np.float32]:
    """Computes the fraction of each pixel that a shape covers.

    Args:
        shape: a word of the grammar.
        radius: in pixels.
        centre: (x, y) in pixels.

    Returns:
        float32 [64, 64] in [0, 1].
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; the grammar has {', '.join(SHAPES)}")
    axis = np.arange(PICTURE_SIZE, dtype=np.float32) + 0.5
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - _SQUARE_HALF_SIDE * radius
    else:
        planes = [nx * x + ny * y for nx, ny in _TRIANGLE_NORMALS]
        distance = np.maximum.reduce(np.broadcast_arrays(*planes)) - _TRIANGLE_INRADIUS * radius
    covered: NDArray[np.float32] = np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
    return covered


def render(scene: Scene, rng: np.random.Generator | None = None) -> NDArray[np.uint8]:
    """Renders a scene to uint8 [64, 64, 3]. ``rng`` moves each object by up to 2 pixels; None centres them."""
    picture = np.broadcast_to(BACKGROUND_RGB[scene.background], (PICTURE_SIZE, PICTURE_SIZE, 3)).astype(np.float32)
    for item in scene.objects:
        alpha = coverage(item.shape, RADIUS[item.size], _centre(item, rng))[..., None]
        picture = picture * (1 - alpha) + COLOUR_RGB[item.colour] * alpha
    return np.rint(picture).astype(np.uint8)


def _centre(item: SceneObject, rng: np.random.Generator | None) -> tuple[float, float]:
    x, y = CENTRES[item.place]
    if rng is None:
        return x, y
    dx, dy = rng.uniform(-JITTER_PIXELS, JITTER_PIXELS, size=2)
    return x + dx, y + dy
