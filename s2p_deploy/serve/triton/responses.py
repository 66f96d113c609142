"""Errors as Triton's responses."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.serve.request import GivenUpError

if TYPE_CHECKING:
    from types import ModuleType


def error_response(backend: ModuleType, error: Exception) -> Any:  # noqa: ANN401 - Triton's own type
    """A response for a request that came to nothing.

    What a client asked wrongly it is told; of anything unexpected it learns nothing, the server's log everything.
    """
    kinds = backend.TritonError
    match error:
        case InputError():
            failure = kinds(str(error), kinds.INVALID_ARG)
        case GivenUpError():
            failure = kinds(str(error), kinds.CANCELLED)
        case S2PError():
            backend.Logger.log_error(str(error))
            failure = kinds("the picture cannot be drawn: the server's log says why", kinds.INTERNAL)
        case _:
            backend.Logger.log_error("".join(traceback.format_exception(error)))
            failure = kinds("internal error: the server's log says more", kinds.INTERNAL)
    return backend.InferenceResponse(error=failure)
