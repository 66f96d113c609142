"""The fixtures of the product's calibration tests."""

from __future__ import annotations

from tests.calib.conftest import (
    _few_threads,
    base,
    dataset,
    file_bytes,
    float_denoiser,
    pipe,
    prompts,
    recipe,
    source,
    state,
    untrained,
)

__all__ = [
    "_few_threads",
    "base",
    "dataset",
    "file_bytes",
    "float_denoiser",
    "pipe",
    "prompts",
    "recipe",
    "source",
    "state",
    "untrained",
]
