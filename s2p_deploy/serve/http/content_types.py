"""What a body may be. A page of another site can send text or a form unasked, but neither JSON nor own headers."""

from __future__ import annotations

from fastapi import Request

from s2p_deploy.serve.http.problems import Problem, RequestProblem

JSON, BYTES = "application/json", "application/octet-stream"


def takes_json(request: Request) -> None:
    """Refuses a body that does not say that it is JSON.

    Raises:
        RequestProblem: 415.
    """
    _check(request, (JSON,))


def takes_tensors(request: Request) -> None:
    """Refuses a body that says to be neither JSON nor bytes; KServe's clients name no type at all.

    Raises:
        RequestProblem: 415.
    """
    _check(request, (JSON, BYTES, ""))


def _check(request: Request, taken: tuple[str, ...]) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in taken:
        raise RequestProblem(Problem(415, f"the body must be {JSON} (the Content-Type header says otherwise)"))
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestProblem(Problem(415, "the body must not be compressed (the Content-Encoding header says it is)"))
