"""Three ways to share an engine under the same arrivals: one at a time, request by request, step by step.

Poisson arrivals of 10, 25 and 50 steps at three loads, given as parts of what the engine draws step by step where all
requests are there at once. The same requests arrive at the same moments in every way; latency counts from the arrival.

    python -m benchmarks.serving.arrivals ENGINE --out benchmarks/results/serving.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.bench.worker import memory
from s2p_deploy.families import resolve_base
from s2p_deploy.records import Engine
from s2p_deploy.serve.batching import BATCHINGS
from s2p_deploy.serve.generation_loop import Observer
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.service import ImageService, ServiceSettings, open_service

if TYPE_CHECKING:
    from s2p_deploy.serve.batching import Batching
    from s2p_deploy.serve.request import RequestFuture

STEPS = (10, 25, 50)
LOADS = {"low": 0.5, "middle": 0.75, "high": 0.95}
PROMPT = "a large red circle at the top left and a small blue square at the bottom right, white background"
NO_LIMIT = 3600.0
BURST = 90  # requests


class BatchLog(Observer):
    """Samples of every batch."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
        """Notes how many samples it had."""
        self.samples.append(samples)


def arrivals(count: int, per_second: float, seed: int) -> list[tuple[float, ImageRequest]]:
    """Moments in seconds, and what arrives then: guided pictures."""
    draw, moment, found = random.Random(seed), 0.0, []
    for number in range(count):
        moment += draw.expovariate(per_second)
        found.append((moment, ImageRequest(PROMPT, draw.choice(STEPS), 2.0, seed=number)))
    return found


def played(service: ImageService, requests: list[tuple[float, ImageRequest]]) -> dict[str, float]:
    """Submits requests as they arrive and waits for all; seconds from arrival to picture, pictures per second."""
    start = time.monotonic()
    futures: list[tuple[float, RequestFuture]] = []
    ends: dict[str, float] = {}
    for moment, request in requests:
        time.sleep(max(0.0, start + moment - time.monotonic()))
        future = service.submit(request, timeout=NO_LIMIT)
        future.add_done_callback(lambda _done, own=future.id: ends.update({own: time.monotonic()}))
        futures.append((start + moment, future))
    for _, future in futures:
        future.result()
    seconds = sorted(ends[future.id] - arrived for arrived, future in futures)
    quantiles = statistics.quantiles(seconds, n=20, method="inclusive")
    rate = len(seconds) / (max(ends.values()) - start)
    return {"pictures_per_s": rate, "p50_s": quantiles[9], "p95_s": quantiles[18]}


def burst_rate(service: ImageService, count: int) -> float:
    """Pictures per second where all are asked for at once."""
    start = time.monotonic()
    requests = [ImageRequest(PROMPT, STEPS[number % len(STEPS)], 2.0, seed=number) for number in range(count)]
    for future in [service.submit(request, timeout=NO_LIMIT) for request in requests]:
        future.result()
    return count / (time.monotonic() - start)


def measured(engine: Engine, model: str, count: int, seed: int) -> dict[str, Any]:
    """Every way at every load; the ways take turns within a load, so that a slow minute of the machine hits all."""
    logs = {batching: BatchLog() for batching in BATCHINGS}
    base = resolve_base(model)
    services = {
        batching: open_service(engine, base, ServiceSettings(batching, max_waiting=count), logs[batching])
        for batching in BATCHINGS
    }
    try:
        rates = {batching: burst_rate(service, BURST) for batching, service in services.items()}
        rows = []
        for load, factor in LOADS.items():
            requests = arrivals(count, factor * rates["step"], seed)
            for batching, service in services.items():
                rows.append(_row(load, factor, batching, service, requests, logs[batching]))
                print(rows[-1], flush=True)
        about = asdict(services["step"].info)
        return {"engine": about, "burst_pictures_per_s": rates, "requests": count, "rows": rows}
    finally:
        for service in services.values():
            service.close()


def _row(
    load: str,
    factor: float,
    batching: Batching,
    service: ImageService,
    requests: list[tuple[float, ImageRequest]],
    log: BatchLog,
) -> dict[str, Any]:
    log.samples.clear()
    found = played(service, requests)
    batch = statistics.mean(log.samples)
    return {"load": load, "of_burst": factor, "batching": batching} | found | {"samples": batch, "rss": memory()["rss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = measured(Engine.open(given.engine), given.model, given.requests, given.seed)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
