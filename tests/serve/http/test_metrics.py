"""Prometheus's view."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.serve.http.live_server import STEPS, LiveServer


def numbers(server: LiveServer) -> dict[tuple[str, str], float]:
    """Sample and its labels' values, in the order of their names -> value."""
    text = server.get("/metrics").body.decode()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, ",".join(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for found in families
        for sample in found.samples
    }


def test_a_picture_is_counted(server: LiveServer) -> None:
    before = numbers(server)
    assert server.draw(scheduler="ddim", guidance_scale=2.0).status == 200
    assert server.draw(n=100).status == 400
    after = numbers(server)

    def more(name: str, *labels: str) -> float:
        key = (name, ",".join(labels))
        return after[key] - before.get(key, 0.0)

    assert more("s2p_requests_total", "drawn", "small") == 1
    assert more("s2p_request_seconds_count", "small") == 1
    assert more("s2p_step_seconds_count", "small") == STEPS
    assert more("s2p_step_seconds_sum", "small") > 0
    assert more("s2p_batch_samples_sum", "small") == 2 * STEPS
    assert more("s2p_batch_samples_bucket", "2.0", "small") == STEPS
    assert more("s2p_http_responses_total", "200") == 2  # the first look at the metrics is one
    assert more("s2p_http_responses_total", "400") == 1
    assert after["s2p_waiting_requests", "small"] == after["s2p_active_requests", "small"] == 0


def test_it_is_prometheus_text(server: LiveServer) -> None:
    assert server.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
