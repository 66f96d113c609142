"""Requests made up from the app's own schema: none may find a defect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings, strategies
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from s2p_deploy.serve.http.images import HttpLimits
from s2p_deploy.serve.http.metrics import Metrics
from tests.serve.http.live_server import LiveServer, live_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serve.http.conftest import Opening

EXAMPLES = {"post": 40, "get": 4, "put": 4, "delete": 4}
CONFORMS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
CHECKS = {GenerationMode.POSITIVE: CONFORMS, GenerationMode.NEGATIVE: [*CONFORMS, negative_data_rejection]}
LIMITS = HttpLimits(steps=3, pictures=2)


@pytest.fixture(scope="module")
def hasty(opening: Opening) -> Iterator[LiveServer]:
    """Draws few steps, so that many wishes are tried."""
    metrics = Metrics()
    with live_server({"small": opening("small", metrics)}, LIMITS, metrics=metrics) as live:
        yield live


@pytest.mark.parametrize("mode", CHECKS)
def test_no_request_finds_a_defect(hasty: LiveServer, mode: GenerationMode) -> None:
    tried = set()
    for found in schemathesis.openapi.from_url(f"{hasty.url}/openapi.json").get_all_operations():
        operation = found.ok()
        if mode == GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing in it could be wrong
        try_operation(operation, mode)
        tried.add(operation.path)
    assert "/v1/images/generations" in tried


def try_operation(operation: schemathesis.APIOperation, mode: GenerationMode) -> None:
    cases = operation.as_strategy(generation_mode=mode)

    @settings(max_examples=EXAMPLES[operation.method], deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategies.data())
    def attempt(data: strategies.DataObject) -> None:
        try:
            case = data.draw(cases)
        except ValueError as error:  # schemathesis cannot look at some of the files that it makes
            assert "Binary" in str(error)  # noqa: PT017 - a request was not made, nothing was tried
            reject()
        case.call_and_validate(checks=CHECKS[mode])

    attempt()
