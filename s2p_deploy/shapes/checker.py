"""Checker of ``shapes`` pictures: reads a picture as a scene and scores it against its caption (attribute accuracy).

It replaces the CLIP score offline: nothing in it is learned, so it cannot share a flaw with the pipeline.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.shapes.scenes import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    PICTURE_SIZE,
    PLACES,
    RADIUS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    coverage,
    parse,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

_HALF = PICTURE_SIZE // 2
_MIN_PIXELS = 40  # a small object covers 146 to 154 pixels; less than a quarter of that is a speck
_QUADRANT = {
    "top left": (slice(0, _HALF), slice(0, _HALF)),
    "top right": (slice(0, _HALF), slice(_HALF, None)),
    "bottom left": (slice(_HALF, None), slice(0, _HALF)),
    "bottom right": (slice(_HALF, None), slice(_HALF, None)),
}


@dataclass(frozen=True)
class AttributeScore:
    """Attributes that are right, of all: place, colour, shape, size per object; background and count per scene."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Returns ``right / total``."""
        return self.right / self.total


def read_picture(picture: NDArray[np.uint8]) -> Scene:
    """Reads the scene of a picture uint8 [64, 64, 3]; objects in the order of ``PLACES``, possibly none."""
    if picture.shape != (PICTURE_SIZE, PICTURE_SIZE, 3):
        raise ValueError(f"expected a picture of shape (64, 64, 3), got {picture.shape}")
    names = BACKGROUNDS + COLOURS
    palette = np.array([*BACKGROUND_RGB.values(), *COLOUR_RGB.values()], dtype=np.float32)
    distance = ((picture[:, :, None, :].astype(np.float32) - palette) ** 2).sum(-1)
    nearest = distance.argmin(-1)
    counts = np.bincount(nearest.ravel(), minlength=len(names))
    background = BACKGROUNDS[int(counts[: len(BACKGROUNDS)].argmax())]
    objects = (_read_quadrant(nearest, place, names.index(background)) for place in PLACES)
    return Scene(tuple(item for item in objects if item is not None), background)


def score_picture(picture: NDArray[np.uint8], scene: Scene) -> AttributeScore:
    """Scores a picture against the scene of its prompt (4 attributes per object, 2 per scene)."""
    seen = read_picture(picture)
    by_place = {item.place: item for item in seen.objects}
    right = int(seen.background == scene.background) + int(len(seen.objects) == len(scene.objects))
    for wanted in scene.objects:
        got = by_place.get(wanted.place)
        if got is not None:
            right += 1 + (got.colour == wanted.colour) + (got.shape == wanted.shape) + (got.size == wanted.size)
    return AttributeScore(right, 2 + 4 * len(scene.objects))


def attribute_accuracy(pictures: Iterable[NDArray[np.uint8]], captions: Iterable[str]) -> float:
    """Computes the fraction of right attributes over all pictures and their captions.

    Raises:
        ValueError: there is no picture, or a caption is not of the grammar.
    """
    scores = [score_picture(p, parse(c)) for p, c in zip(pictures, captions, strict=True)]
    if not scores:
        raise ValueError("attribute accuracy needs at least one picture")
    return sum(s.right for s in scores) / sum(s.total for s in scores)


def _read_quadrant(nearest: NDArray[np.intp], place: str, background: int) -> SceneObject | None:
    rows, columns = _QUADRANT[place]
    quadrant = nearest[rows, columns]
    counts = np.bincount(quadrant.ravel(), minlength=len(BACKGROUNDS) + len(COLOURS))[len(BACKGROUNDS) :]
    if counts.max() < _MIN_PIXELS:
        return None
    colour = int(counts.argmax())
    mask = np.zeros(nearest.shape, dtype=bool)
    mask[rows, columns] = quadrant != background
    size, shape = _best_template(mask)
    return SceneObject(size, COLOURS[colour], shape, place)


def _best_template(mask: NDArray[np.bool_]) -> tuple[str, str]:
    """Finds the size and shape whose template, centred on the mask's bounding box, overlaps it best.

    Overlap is intersection over union.
    """
    ys, xs = np.nonzero(mask)
    shift_y, shift_x = (round((v.min() + v.max() + 1) / 2) for v in (ys, xs))
    patch = np.zeros_like(mask)
    inside = (abs(ys - shift_y + _HALF) < PICTURE_SIZE) & (abs(xs - shift_x + _HALF) < PICTURE_SIZE)
    ys, xs = ys[inside] - shift_y + _HALF, xs[inside] - shift_x + _HALF
    keep = (ys >= 0) & (ys < PICTURE_SIZE) & (xs >= 0) & (xs < PICTURE_SIZE)
    patch[ys[keep], xs[keep]] = True
    overlaps = {key: (patch & template).sum() / (patch | template).sum() for key, template in _templates().items()}
    return max(overlaps, key=lambda key: overlaps[key])


@cache
def _templates() -> dict[tuple[str, str], NDArray[np.bool_]]:
    """Makes a mask of every size and shape whose bounding box is centred in the picture."""
    templates = {}
    for size, shape in itertools.product(SIZES, SHAPES):
        mask = coverage(shape, RADIUS[size], (_HALF, _HALF)) > 0.5
        ys, _ = np.nonzero(mask)
        templates[size, shape] = np.roll(mask, _HALF - round((ys.min() + ys.max() + 1) / 2), axis=0)
    return templates
