"""The fixtures of the product's calibration tests."""

from __future__ import annotations

from tests.calib.conftest import (
    base,
    dataset,
    file_bytes,
    float_denoiser,
    pipe,
    prompts,
    pytest_runtest_setup,
    recipe,
    source,
    state,
    untrained,
)

__all__ = [
    "base",
    "dataset",
    "file_bytes",
    "float_denoiser",
    "pipe",
    "prompts",
    "pytest_runtest_setup",
    "recipe",
    "source",
    "state",
    "untrained",
]
