"""What a service says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServiceFacts:
    """A model that is served.

    ``engine`` is its digest. ``batches`` are the engine's batch sizes with the median milliseconds of each, the last of
    them the largest that is formed; ``size`` is height and width in pixels of what it draws unless asked otherwise, and
    ``sizes`` what may be asked for, in words; ``schedulers`` those that run with ``steps`` steps.
    """

    name: str
    engine: str
    backend: str
    hint: str
    recipe: str
    batching: str
    batches: tuple[tuple[int, float], ...]
    steps: int
    guidance_scale: float
    size: tuple[int, int]
    sizes: str
    schedulers: tuple[str, ...]
