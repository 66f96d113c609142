"""The body of OpenAI's ``POST /v1/images/generations`` as far as it is taken, and fields beyond it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from s2p_deploy.serve.http.asked import MOST_SEED, check_limits, size_from_text
from s2p_deploy.serve.http.problems import refusal
from s2p_deploy.serve.request import ImageRequest

if TYPE_CHECKING:
    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.http.limits import HttpLimits

_RANDOM_SEEDS = 2**32  # a number that every client can hold


class ImageForm(BaseModel):
    """What to draw. What is left out comes from the model."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, description="Pictures; they get seed, seed + 1, ...")] = 1
    size: Annotated[str | None, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] = None
    response_format: Literal["b64_json"] = "b64_json"
    seed: Annotated[int | None, Field(ge=0, le=MOST_SEED)] = None
    num_inference_steps: Annotated[int | None, Field(ge=1)] = None
    guidance_scale: Annotated[float | None, Field(ge=0, description="Up to 1: without guidance.")] = None
    negative_prompt: str | None = None
    scheduler: Annotated[str | None, Field(max_length=64)] = None
    stream: Annotated[bool, Field(description="Server-sent events: progress, then the picture.")] = False

    def requests(self, facts: ServiceFacts, limits: HttpLimits) -> list[ImageRequest]:
        """One request per picture.

        Raises:
            RequestProblem: more than a client may ask for.
        """
        if self.n > limits.pictures:  # before as many are made
            raise refusal(f"n is {self.n}: 1 to {limits.pictures} are allowed", "n")
        if self.stream and self.n > 1:
            raise refusal("stream draws one picture: leave n out", "stream")
        seed = secrets.randbelow(_RANDOM_SEEDS) if self.seed is None else self.seed
        guidance = facts.guidance_scale if self.guidance_scale is None else self.guidance_scale
        size = size_from_text(self.size, facts, limits)
        found = [
            ImageRequest(
                self.prompt,
                self.num_inference_steps or facts.steps,
                guidance,
                seed + number,
                self.negative_prompt or "",
                size,
                self.scheduler,
            )
            for number in range(self.n)
        ]
        check_limits(found, limits)
        return found
