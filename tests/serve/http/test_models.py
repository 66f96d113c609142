"""From the first second to the last: loading, ready, draining, closed."""

from __future__ import annotations

import threading

from s2p_deploy.errors import IntegrityError
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.service import ImageService
from tests.serve.http.conftest import Opening
from tests.serve.http.live_server import MANY_STEPS, SOME_STEPS, LiveServer, live_server

PROBES = ("/health/live", "/health/ready")


def statuses(server: LiveServer) -> list[int]:
    return [server.get(path).status for path in PROBES]


def test_it_is_live_at_once_and_ready_when_everything_is_loaded(opening: Opening) -> None:
    metrics, gate = Metrics(), threading.Event()

    def second() -> ImageService:
        gate.wait()
        return opening("fp", metrics)()

    with live_server({"small": opening("small", metrics), "fp": second}, metrics=metrics, ready=False) as server:
        assert statuses(server) == [200, 503]
        server.wait_for(lambda: server.models.loaded("small") is not None)
        assert statuses(server) == [200, 503]
        found = server.draw(model="fp")
        assert (found.status, found.data["error"]["code"]) == (503, "not_ready")
        assert int(found.headers["retry-after"]) > 0
        assert [model["ready"] for model in server.get("/v1/models").data["data"]] == [False, False]
        gate.set()
        server.wait_for(lambda: server.models.state == "ready")
        assert statuses(server) == [200, 200]


def test_a_model_that_cannot_be_loaded_ends_the_server(opening: Opening) -> None:
    def broken() -> ImageService:
        raise IntegrityError("the engine was changed")

    with live_server({"small": broken}, ready=False) as server:
        server.wait_for(lambda: server.models.failure is not None)
        assert isinstance(server.models.failure, IntegrityError)


def test_draining_finishes_what_runs_and_takes_nothing_new(opening: Opening) -> None:
    metrics, answers = Metrics(), []
    with live_server({"small": opening("small", metrics)}, metrics=metrics) as server:
        slow = threading.Thread(target=lambda: answers.append(server.draw(num_inference_steps=SOME_STEPS)))
        slow.start()
        server.wait_for(lambda: server.metric("s2p_active_requests", model="small") == 1)
        drain = threading.Thread(target=lambda: answers.append(server.models.drain(30)))
        drain.start()
        server.wait_for(lambda: server.models.state == "closing")
        late = server.draw()
        assert (late.status, late.data["error"]["code"]) == (503, "closing")
        assert statuses(server) == [200, 503]
        slow.join()
        drain.join()
    assert {one if isinstance(one, bool) else one.status for one in answers} == {200, True}


def test_what_is_not_done_when_it_closes_is_answered(opening: Opening) -> None:
    metrics, answers = Metrics(), []
    with live_server({"small": opening("small", metrics)}, metrics=metrics) as server:
        slow = threading.Thread(target=lambda: answers.append(server.draw(num_inference_steps=MANY_STEPS)))
        slow.start()
        server.wait_for(lambda: server.metric("s2p_active_requests", model="small") == 1)
        assert not server.models.drain(0.1)
        server.models.close()
        slow.join()
    assert (answers[0].status, answers[0].data["error"]["code"]) == (503, "closing")
