"""Error responses: a status and one sentence in OpenAI's form, and which error gets which."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from s2p_deploy.errors import InputError
from s2p_deploy.serve.request import (
    CancelledRequestError,
    ClosingError,
    DeadlineError,
    OverloadedError,
    StoppedError,
    UnknownLoraError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starlette.types import Scope

CLIENT_LEFT = 499  # nobody reads it; the log does
_RECORD = {"type": "object", "properties": {"error": {"type": "object"}}, "required": ["error"]}
_DESCRIBED = {"description": "What is wrong.", "content": {"application/json": {"schema": _RECORD}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {"4XX": _DESCRIBED, "5XX": _DESCRIBED}  # as OpenAPI describes them
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_SECONDS_UNTIL_READY = 2
_SUCH_AS = 'send a JSON object such as {"prompt": "a large red circle"}'


@dataclass(frozen=True)
class Problem:
    """``param`` is the field at fault, ``code`` OpenAI's word for the problem."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


class RequestProblem(Exception):  # noqa: N818 - carries what is answered
    """A request that cannot be met."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def problem_of(error: Exception) -> Problem:
    """Describes an error to a client; a defect of the server's own is not described."""
    match error:
        case RequestProblem():
            return error.problem
        case OverloadedError():
            return Problem(429, str(error), code="overloaded", headers=(("retry-after", str(error.retry_after)),))
        case ClosingError():
            return unavailable("the server is closing", "closing")
        case StoppedError():
            return unavailable(str(error), "stopped")
        case DeadlineError():
            return Problem(504, str(error), code="deadline_exceeded")
        case CancelledRequestError():
            return Problem(CLIENT_LEFT, "the client has left", code="cancelled")
        case InputError():
            unknown = isinstance(error, UnknownLoraError)
            return Problem(404, str(error), "lora", "lora_not_found") if unknown else Problem(400, str(error))
        case _:
            return Problem(500, "internal error: the server's log says more under this request id", code="internal")


def invalid_form(error: Mapping[str, Any], fields: Iterable[str]) -> Problem:
    """Describes the first thing that is wrong with a form which has these fields; ``error`` is one of pydantic's."""
    field = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "json_invalid":
            return Problem(400, f"the body is not JSON: {error['ctx']['error']} at character {field}: {_SUCH_AS}")
        case "missing" if not field:
            return Problem(400, f"the body is empty: {_SUCH_AS}")
        case "model_attributes_type" if not field:
            return Problem(400, f"the body is no JSON object: {_SUCH_AS}")
        case "extra_forbidden" if len(error["loc"]) > 1:  # of a part of a field
            return Problem(400, f"{field} is not supported: leave it out", field)
        case "extra_forbidden":
            return Problem(400, f"{field} is not supported: there are {', '.join(fields)}", field)
        case "missing":
            return Problem(400, f"{field} is missing", field)
        case _:
            return Problem(400, f"{field or 'the body'}: {error['msg']}", field or None)


def unreadable_json(error: BaseException | None) -> Problem | None:
    """Describes why a body cannot be read as JSON at all; None where the error is not of that kind."""
    match error:
        case UnicodeDecodeError():
            return Problem(400, f"the body is not UTF-8 at byte {error.start}: send JSON in UTF-8")
        case RecursionError():
            return Problem(400, f"the body is nested too deep: {_SUCH_AS}")
        case ValueError():  # not json.JSONDecodeError, which is described as the form's
            most = sys.get_int_max_str_digits()
            return Problem(400, f"the body has a number of more than {most} digits: send a smaller one")
        case _:
            return None


def problem_response(problem: Problem, scope: Scope) -> JSONResponse:
    """Makes the response to a request."""
    return JSONResponse(problem_data(problem, request_id_of(scope)), problem.status, dict(problem.headers))


def problem_data(problem: Problem, request_id: str) -> dict[str, Any]:
    """Makes OpenAI's body of an error, with the request's id."""
    about = {
        "message": printable(problem.message),
        "type": problem.kind,
        "param": None if problem.param is None else printable(problem.param),
        "code": problem.code,
        "request_id": request_id,
    }
    return {"error": about}


def request_id_of(scope: Scope) -> str:
    """Returns the id that the request log gave a request."""
    return str(scope.get("state", {}).get("request_id", ""))


def printable(text: str) -> str:
    """Makes foreign text fit for a log and for JSON: no line breaks, control characters or halves of characters."""
    return "".join(one if one.isprintable() else " " for one in text)[:500]


def unavailable(message: str, code: str) -> Problem:
    """Makes a 503 that may be tried again soon."""
    return Problem(503, message, code=code, headers=(("retry-after", str(_SECONDS_UNTIL_READY)),))
