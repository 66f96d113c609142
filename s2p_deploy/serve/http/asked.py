"""From an API's request to those of the service: defaults of the model filled in, the server's limits kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from s2p_deploy.serve.http.problems import refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.http.limits import HttpLimits
    from s2p_deploy.serve.request import ImageRequest

TIMEOUT = "x-request-timeout"
MOST_SEED = 2**63 - 1


def check_limits(requests: Sequence[ImageRequest], limits: HttpLimits) -> None:
    """Refuses what is more than a client may ask for.

    Raises:
        RequestProblem: it is, with the field at fault.
    """
    if not 1 <= len(requests) <= limits.pictures:
        raise refusal(f"{len(requests)} pictures in one request: 1 to {limits.pictures} are allowed", "n")
    for request in requests:
        _check_text(request.prompt, "prompt", limits)
        _check_text(request.negative, "negative_prompt", limits)
        if not 1 <= request.steps <= limits.steps:
            raise refusal(f"{request.steps} steps: 1 to {limits.steps} are allowed", "num_inference_steps")
        if not 0 <= request.guidance_scale <= limits.guidance_scale:
            raise refusal(f"a guidance scale is from 0 to {limits.guidance_scale:g}", "guidance_scale")
        if not 0 <= request.seed <= MOST_SEED + limits.pictures:
            raise refusal(f"a seed is from 0 to {MOST_SEED}", "seed")


def size_from_text(text: str | None, facts: ServiceFacts, limits: HttpLimits) -> tuple[int, int] | None:
    """Height and width in pixels of ``WIDTHxHEIGHT``; None for the model's own size.

    Raises:
        RequestProblem: it is not allowed.
    """
    if text is None or text == "auto":
        return None
    width, _, height = text.partition("x")
    size = (int(height), int(width))
    if size == facts.size:
        return None
    if size not in limits.sizes:
        allowed = ", ".join(f"{width}x{height}" for height, width in (facts.size, *sorted(limits.sizes)))
        raise refusal(f"size {text} is not served: use {allowed}", "size")
    return size


def seconds_allowed(header: str | None, limits: HttpLimits) -> float:
    """How long a request may take: what its header asks, as far as the server's limit.

    Raises:
        RequestProblem: the header is no positive number.
    """
    if header is None:
        return limits.seconds
    try:
        wanted = float(header)
    except ValueError:
        wanted = math.nan
    if not wanted > 0:
        raise refusal(f"{TIMEOUT} must be a number of seconds above 0", TIMEOUT)
    return min(wanted, limits.seconds)


def _check_text(text: str, param: str, limits: HttpLimits) -> None:
    if len(text) > limits.prompt_characters:
        raise refusal(f"a prompt of {len(text)} characters: {limits.prompt_characters} are allowed", param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refusal("a prompt must be text: it holds half a character", param) from error
