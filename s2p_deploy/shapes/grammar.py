"""The caption grammar of the bundled ``shapes`` pipelines: scenes, captions, and the held-out split.

A scene is one or two objects in distinct corners over a plain background. Every caption is produced by
:func:`caption` and read back by :func:`parse`, so a picture can be judged against its prompt without a
language model (see :mod:`s2p_deploy.shapes.checker`).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

SIZES = ("large", "small")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("white", "gray", "black")

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
    """The one caption of a scene, e.g. ``a small red circle at the top left, white background``."""
    parts = " and ".join(f"a {o.size} {o.colour} {o.shape} at the {o.place}" for o in scene.objects)
    return f"{parts}, {scene.background} background"


def parse(text: str) -> Scene:
    """Inverse of :func:`caption`.

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
    """Every object of the grammar (2 sizes x 6 colours x 3 shapes x 4 places = 144)."""
    return tuple(SceneObject(*words) for words in itertools.product(SIZES, COLOURS, SHAPES, PLACES))


def is_held_out(item: SceneObject) -> bool:
    """Whether this combination of size, colour, shape and place is kept out of all training pictures (one in eight)."""
    words = f"{item.size} {item.colour} {item.shape} {item.place}"
    return hashlib.sha256(words.encode()).digest()[0] % 8 == 0


def sample_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """A random scene. With ``held_out`` its first object is a held-out combination, otherwise no object is."""
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
    """Endless captions of :func:`sample_scene`, each given once."""
    seen: set[str] = set()
    while True:
        text = caption(sample_scene(rng, held_out=held_out))
        if text not in seen:
            seen.add(text)
            yield text
