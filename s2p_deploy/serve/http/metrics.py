"""Prometheus metrics of a server and of the services behind it, in a registry of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from s2p_deploy.serve.generation_loop import Observer

if TYPE_CHECKING:
    from s2p_deploy.serve.generation_loop import Ending
    from s2p_deploy.serve.request import RequestFuture
    from s2p_deploy.serve.service import ImageService

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_REQUEST_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server; those of a model are labelled with its name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        model, of = ("model",), self.registry
        self.responses = Counter(
            "s2p_http_responses", "Answers by status; 499: the client left.", ("status",), registry=of
        )
        self.requests = Counter("s2p_requests", "Pictures by how they ended.", ("model", "ending"), registry=of)
        self.seconds = Histogram(
            "s2p_request_seconds", "From taken to drawn.", model, registry=of, buckets=_REQUEST_SECONDS
        )
        self.step_seconds = Histogram(
            "s2p_step_seconds", "One call of the engine.", model, registry=of, buckets=_STEP_SECONDS
        )
        self.samples = Histogram(
            "s2p_batch_samples", "Latents in one call of the engine.", model, registry=of, buckets=_SAMPLES
        )
        self.padding = Counter("s2p_padding_samples", "Latents added to reach a profiled batch.", model, registry=of)
        self.waiting = Gauge("s2p_waiting_requests", "Pictures that wait for their first step.", model, registry=of)
        self.active = Gauge("s2p_active_requests", "Pictures that are being drawn.", model, registry=of)

    def count_response(self, status: int) -> None:
        """Counts a response by its status."""
        self.responses.labels(str(status)).inc()

    def observer(self, model: str) -> Observer:
        """Makes an observer that counts what a service does."""
        return _Counting(self, model)

    def watch(self, model: str, service: ImageService) -> None:
        """Reads a service's queue whenever metrics are requested."""
        self.waiting.labels(model).set_function(lambda: service.waiting)
        self.active.labels(model).set_function(lambda: service.active)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Counting(Observer):
    def __init__(self, metrics: Metrics, model: str) -> None:
        self._requests, self._model = metrics.requests, model
        self._seconds, self._step_seconds = metrics.seconds.labels(model), metrics.step_seconds.labels(model)
        self._samples, self._padding = metrics.samples.labels(model), metrics.padding.labels(model)

    def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
        """Counts a call of the engine."""
        self._samples.observe(samples)
        self._padding.inc(padded - samples)
        self._step_seconds.observe(seconds)

    def ended(self, future: RequestFuture, ending: Ending, seconds: float) -> None:
        """Counts a request; how long it took only where it was drawn."""
        self._requests.labels(self._model, ending).inc()
        if ending == "drawn":
            self._seconds.observe(seconds)
