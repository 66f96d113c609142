"""How much a client may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HttpLimits:
    """Times are in seconds, ``body_bytes`` covers one request's body.

    ``seconds`` is how long a request may take unless it asks for less. ``sizes`` are heights and widths in pixels that
    may be asked for besides the model's own.
    """

    seconds: float = 120.0
    steps: int = 100
    pictures: int = 4
    prompt_characters: int = 2000
    guidance_scale: float = 50.0
    sizes: frozenset[tuple[int, int]] = frozenset()
    body_bytes: int = 2**20
    body_seconds: float = 15.0
    connections: int = 2000
