"""Writes docs/batching.md from what ``serving.py`` and ``serving_clients.py`` measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# Batching

How `s2p-deploy serve` shares one engine among requests, and what that is worth. This page is written by
`python benchmarks/serving_page.py`.

A server of diffusion models usually draws a batch from its first step to its last: requests must have the same number
of steps and wait for those before them. Here the row of the scale table travels with every sample, so one batch may
hold requests at any step of any schedule. `--batching step` (the default) forms it anew at every step:

1. Every request is a call of the stock diffusers pipeline, run as a coroutine (greenlet): it stops where it needs the
   engine, with the latents, rows and text of its step. Its scheduler, seed and guidance are its own.
2. The drawing thread takes what waits, oldest first, up to the largest batch worth forming; picture sizes take turns.
   Guided requests bring two samples, unguided ones one, and both share batches.
3. The engine runs once, padded up to a batch size that it was compiled for; every request gets its part and goes on.
4. Text encoders and the autoencoder run in a second thread, off the denoising path. A few requests begin ahead of their
   place, so that their text is encoded when one gets free.

Batch sizes are timed when the server starts; the largest that is formed is the first within 10 % of the best time per
sample. Engines that were built with `--lowering runtime_q` take one row per batch: there, only requests that happen to
be on the same timestep meet.

`--batching request` draws requests of the same schedule together from first to last, `--batching one` one after the
other. A request that is given up (the client left) or late leaves the batch before the next step. If a batch fails,
each of its requests is tried alone, so that one request's failure is not the others'.

A picture does not depend on who shared its batches: on the CPU engines tried here it was the same to the bit as that of
`s2p-deploy generate` with the same seed. An engine whose results depend on the batch size may differ by its rounding.

## Three ways under the same arrivals

`python benchmarks/serving.py ENGINE --out benchmarks/results/serving.json`: Poisson arrivals of guided pictures of 10,
25 and 50 steps, the same for all three; loads are parts of what `step` draws where everything is there at once.
Latency counts from the arrival to the picture, without HTTP.
"""

CLIENTS = """
## A crowd that comes and goes

`python benchmarks/serving_clients.py ENGINE --seconds 600 --out benchmarks/results/serving_clients.json`: real HTTP
clients on the server's own two cores, each with one request open at a time, 30 % of which it gives up at a random
moment. At the end as many ask once more and all leave at the same moment.
"""


def page(serving: dict[str, Any], clients: dict[str, Any]) -> str:
    """The page's text."""
    return "\n".join((HEAD, *_ways(serving), CLIENTS, *_crowd(clients), ""))


def _ways(found: dict[str, Any]) -> Iterator[str]:
    engine, rates = found["engine"], found["burst_pictures_per_s"]
    batches = ", ".join(f"{size}: {ms:.1f} ms" for size, ms in engine["batches"])
    yield f"{engine['recipe']} on {engine['backend']} ({engine['hint']}), the bundled pipeline; batches of {batches}."
    yield f"{found['requests']} requests per row. All at once: " + ", ".join(
        f"`{batching}` {rate:.1f}" for batching, rate in rates.items()
    )
    yield "pictures per second."
    yield ""
    yield "| load | batching | pictures/s | p50 s | p95 s | p95 to `request` | samples per batch |"
    yield "|---|---|---|---|---|---|---|"
    rows = found["rows"]
    for row in rows:
        beside = next(one for one in rows if (one["load"], one["batching"]) == (row["load"], "request"))
        cells = (
            f"{row['load']} ({row['of_burst']:g})",
            f"`{row['batching']}`",
            f"{row['pictures_per_s']:.2f}",
            f"{row['p50_s']:.2f}",
            f"{row['p95_s']:.2f}",
            f"{row['p95_s'] / beside['p95_s']:.2f}",
            f"{row['samples']:.1f}",
        )
        yield f"| {' | '.join(cells)} |"


def _crowd(found: dict[str, Any]) -> Iterator[str]:
    answers = found["answers"]
    lost = sum(count for kind, count in answers.items() if kind.startswith("lost"))
    other = {
        kind: count for kind, count in answers.items() if kind not in {"200", "429", "left"} and "lost" not in kind
    }
    rows = (
        ("clients, seconds", f"{found['clients']}, {found['seconds']:.0f}"),
        ("pictures", answers.get("200", 0)),
        ("told to come back (429)", answers.get("429", 0)),
        ("given up by the client", answers.get("left", 0)),
        ("without an answer", lost),
        ("other answers", ", ".join(f"{kind}: {count}" for kind, count in other.items()) or "none"),
        ("pictures that differ from the lone one", found["different_pictures"]),
        ("resident, first and last third of the time", _gigabytes(found, "rss_first_third", "rss_last_third")),
        ("resident afterwards", _gigabytes(found, "rss_after")),
        ("p50, p95 of those drawn", f"{found['p50_s']:.1f} s, {found['p95_s']:.1f} s"),
        ("a lone request takes its usual time again after", f"{found['recovery_s']:.2f} s"),
        ("ready after the start", f"{found['ready_s']:.1f} s"),
        ("SIGTERM to exit, exit code", f"{found['shutdown_s']:.1f} s, {found['exit_code']}"),
    )
    yield "| | |"
    yield "|---|---|"
    for name, value in rows:
        yield f"| {name} | {value} |"


def _gigabytes(found: dict[str, Any], *keys: str) -> str:
    return ", ".join(f"{found[key] / 1e9:.3f} GB" for key in keys)


def main() -> None:
    serving, clients = (
        json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in ("serving.json", "serving_clients.json")
    )
    (ROOT / "docs" / "batching.md").write_text(page(serving, clients), encoding="utf-8")


if __name__ == "__main__":
    main()
