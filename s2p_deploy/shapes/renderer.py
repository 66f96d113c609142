"""Pictures of scenes: 64x64 RGB, anti-aliased from signed distances, in numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.shapes.grammar import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from s2p_deploy.shapes.grammar import Scene, SceneObject

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
CENTRE = dict(zip(PLACES, ((17.0, 17.0), (47.0, 17.0), (17.0, 47.0), (47.0, 47.0)), strict=True))
JITTER_PIXELS = 2.0

_TRIANGLE_NORMALS = ((0.0, 1.0), (0.75**0.5, -0.5), (-(0.75**0.5), -0.5))
_SQUARE_HALF_SIDE, _TRIANGLE_INRADIUS = 0.86, 0.64  # of the radius, so that the three shapes look equally large


def coverage(shape: str, radius: float, centre: tuple[float, float]) -> NDArray[np.float32]:
    """Fraction of each pixel that a shape covers: float32 [64, 64], ``centre`` as (x, y) in pixels."""
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
    """A picture of ``scene``: uint8 [64, 64, 3]. ``rng`` moves each object by up to 2 pixels; None centres them."""
    picture = np.broadcast_to(BACKGROUND_RGB[scene.background], (PICTURE_SIZE, PICTURE_SIZE, 3)).astype(np.float32)
    for item in scene.objects:
        alpha = coverage(item.shape, RADIUS[item.size], _centre(item, rng))[..., None]
        picture = picture * (1 - alpha) + COLOUR_RGB[item.colour] * alpha
    return np.rint(picture).astype(np.uint8)


def _centre(item: SceneObject, rng: np.random.Generator | None) -> tuple[float, float]:
    x, y = CENTRE[item.place]
    if rng is None:
        return x, y
    dx, dy = rng.uniform(-JITTER_PIXELS, JITTER_PIXELS, size=2)
    return x + dx, y + dy
