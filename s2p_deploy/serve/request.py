"""A request for a picture, the future that a service returns for it, and the errors that it can end with."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL.Image import Image

from s2p_deploy.errors import InputError, S2PError

if TYPE_CHECKING:
    from s2p_deploy.pipeline import StartPicture
    from s2p_deploy.serve.loras import ActiveLora


@dataclass(frozen=True)
class LoraWeight:
    """A LoRA of the service by its name, and the weight with which it acts.

    Raises:
        InputError: the weight is not finite.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise InputError(f"the weight {self.weight} of LoRA {self.name!r} must be a finite number")


@dataclass(frozen=True)
class RequestedControl:
    """A ControlNet of the service by its ``name``, and what :class:`s2p_deploy.pipeline.Control` has besides it."""

    name: str
    picture: Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class RequestedImagePrompt:
    """An IP-Adapter of the service by its ``name``, the picture that it reads, and its strength."""

    name: str
    picture: Image
    scale: float = 1.0


@dataclass(frozen=True)
class ImageRequest:
    """One picture to draw.

    ``size`` is height and width in pixels (None: what the denoiser was trained on), ``scheduler`` a name of
    :func:`s2p_deploy.schedulers.scheduler_names` (None: the pipeline's own). Noise comes from ``seed`` alone. With
    ``long_prompts`` texts longer than what the encoders read at once are read in chunks. ``start`` is the picture to
    start from, of this size (None: noise); ``controls`` and ``images`` act beside the text, and the LoRAs that ``lora``
    lists, each once.
    """

    prompt: str
    steps: int
    guidance_scale: float
    seed: int
    negative: str = ""
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    long_prompts: bool = False
    start: StartPicture | None = None
    controls: tuple[RequestedControl, ...] = ()
    images: tuple[RequestedImagePrompt, ...] = ()
    embedded: bool = False
    lora: tuple[LoraWeight, ...] = ()

    def __post_init__(self) -> None:
        names = [one.name for one in self.lora]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"LoRA {twice!r} is named twice: name it once, with one weight")

    @property
    def samples(self) -> int:
        """Latents per call of the denoiser: guidance above 1 predicts with the text and without, unless embedded."""
        return 2 if self.guidance_scale > 1 and not self.embedded else 1


class RequestFuture(Future[Image]):
    """The future of a request that a service has accepted: its result is the picture.

    ``calls`` is how often the denoiser will be called, ``submitted`` and ``deadline`` are moments of
    ``time.monotonic``. ``loras`` are those that the request named. Only the service's own thread completes it.
    """

    def __init__(
        self,
        id: str,  # noqa: A002
        request: ImageRequest,
        calls: int,
        submitted: float,
        deadline: float,
        loras: tuple[ActiveLora, ...] = (),
    ) -> None:
        super().__init__()
        self.id, self.request, self.calls, self.loras = id, request, calls, loras
        self.submitted, self.deadline = submitted, deadline
        self.progress = (0, 0)  # calls of the denoiser that are done, and all there will be (0 until the first is)
        self._cancelled = threading.Event()
        self.set_running_or_notify_cancel()  # from now on Future itself would refuse to cancel

    @property
    def cancel_requested(self) -> bool:
        """Returns whether the client no longer wants the picture."""
        return self._cancelled.is_set()

    def cancel(self) -> bool:
        """Asks the service to drop the request before its next step; the future then raises CancelledRequestError.

        Unlike that of other futures this works while the request runs, also through :func:`asyncio.wrap_future`.
        """
        self._cancelled.set()
        return not self.done()


class UnknownLoraError(InputError):
    """There is no LoRA of a name that was given."""


class OverloadedError(S2PError):
    """The queue is full. ``retry_after`` is in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class ClosingError(S2PError):
    """The service accepts no more requests, or was stopped before this one was done."""


class StoppedError(S2PError):
    """The service ended by a defect of its own; it accepts no more requests and completes none."""


class CancelledRequestError(S2PError):
    """The client has left."""


class DeadlineError(S2PError):
    """The picture was not done before its deadline."""
