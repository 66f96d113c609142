"""What is asked of a service, and the ways in which a request can end without a picture."""

from __future__ import annotations

from dataclasses import dataclass

from s2p_deploy.errors import S2PError


@dataclass(frozen=True)
class ImageRequest:
    """One picture to draw.

    ``size`` is height and width in pixels (None: what the denoiser was trained on), ``scheduler`` a name of
    :func:`s2p_deploy.schedulers.scheduler_names` (None: the pipeline's own). Noise comes from ``seed`` alone.
    """

    prompt: str
    steps: int
    guidance_scale: float
    seed: int
    negative: str = ""
    size: tuple[int, int] | None = None
    scheduler: str | None = None


class OverloadedError(S2PError):
    """The queue is full. ``retry_after`` is in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class ClosingError(S2PError):
    """The service takes no more requests, or was stopped before this one was done."""


class GivenUpError(S2PError):
    """Whoever asked has left."""


class LateError(S2PError):
    """The picture would come too late."""
