"""Many clients against a real server, some of them leaving in the middle: memory, answers, and the pictures' sameness.

Starts ``s2p-deploy serve``, draws every picture once alone, then lets clients ask for them at random for a while, 30 %
of them gone before they are answered; every picture that comes is compared with its lone one. At the end as many ask
once more and all leave at the same moment: how soon is a lone request as fast as before?

    python -m benchmarks.serving.clients ENGINE --seconds 600 --out benchmarks/results/serving_clients.json
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

STEPS, SEEDS = (10, 25, 50), 8
LEAVING = 0.3
PROMPT = "a large red circle at the top left and a small blue square at the bottom right, white background"
BURST_SECONDS = 2.0
PATIENCE = 300.0  # seconds that a client waits for an answer: none may come later

Wanted = tuple[int, int]  # steps and seed


@dataclass
class Server:
    """A running server. ``ready`` is the seconds from its start until it was warm."""

    process: subprocess.Popen[str]
    host: str
    port: int
    ready: float

    def rss(self) -> int:
        """Bytes that it holds."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return 1024 * int(dict(line.split(":", 1) for line in text.splitlines())["VmRSS"].split()[0])


@dataclass
class Seen:
    """What the clients saw."""

    answers: Counter[str] = field(default_factory=Counter)
    differences: list[int] = field(default_factory=list)  # largest of any pixel, per picture, in 8-bit codes
    seconds: list[float] = field(default_factory=list)


def started(engine: Path, log: IO[str], options: list[str]) -> Server:
    command = [sys.executable, "-m", "s2p_deploy.cli", "serve", str(engine), "--port", "0", *options]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
    assert found is not None
    process.stdout.readline()  # comes when it is warm
    return Server(process, found[1], int(found[2]), time.monotonic() - start)


async def asked(server: Server, wanted: Wanted, leave_after: float | None = None) -> tuple[int, bytes, float] | None:
    """Status, body and Retry-After of one request over a connection of its own; None for a client that left."""
    steps, seed = wanted
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": steps, "seed": seed}).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        try:
            answer = await asyncio.wait_for(reader.read(), leave_after or PATIENCE)
        except TimeoutError:
            if leave_after is None:
                raise
            return None
    finally:
        writer.close()
    top, _, content = answer.partition(b"\r\n\r\n")
    again = re.search(rb"(?i)retry-after: (\d+)", top)
    return int(top.split(b" ", 2)[1]), content, float(again[1]) if again else 0.0


def pixels(body: bytes) -> np.ndarray:
    encoded = base64.b64decode(json.loads(body)["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)


async def lone(server: Server) -> dict[Wanted, np.ndarray]:
    """Every picture, drawn while nobody else asks."""
    found = {}
    for wanted in [(steps, seed) for steps in STEPS for seed in range(SEEDS)]:
        answer = await asked(server, wanted)
        assert answer is not None
        assert answer[0] == 200, answer[1][:300]
        found[wanted] = pixels(answer[1])
    return found


async def client(server: Server, number: int, until: float, expected: dict[Wanted, np.ndarray], seen: Seen) -> None:
    draw = random.Random(number)
    while time.monotonic() < until:
        wanted = draw.choice(list(expected))
        leaves = draw.random() < LEAVING
        start = time.monotonic()
        try:
            answer = await asked(server, wanted, draw.uniform(0.0, 20.0) if leaves else None)
        except (TimeoutError, OSError, IndexError, ValueError) as error:
            seen.answers[f"lost: {type(error).__name__}"] += 1
            continue
        if answer is None:
            seen.answers["left"] += 1
            continue
        status, body, again = answer
        seen.answers[str(status)] += 1
        if status == 200:
            seen.seconds.append(time.monotonic() - start)
            seen.differences.append(int(np.abs(pixels(body) - expected[wanted]).max()))
        else:
            await asyncio.sleep(min(again or 1.0, 5.0) * draw.uniform(0.5, 1.5))


async def watched(server: Server, until: float, memory: list[int]) -> None:
    while time.monotonic() < until:
        memory.append(server.rss())
        await asyncio.sleep(5)


async def recovery(server: Server, usual: float) -> float:
    """Seconds from now until a lone request takes less than twice what it usually does."""
    start = time.monotonic()
    while True:
        before = time.monotonic()
        answer = await asked(server, (10, 0))
        if answer is not None and answer[0] == 200 and time.monotonic() - before < 2 * usual:
            return before - start
        await asyncio.sleep(0.02)


async def measured(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    expected = await lone(server)
    before = time.monotonic()
    for _ in range(10):
        await asked(server, (10, 0))
    usual = (time.monotonic() - before) / 10
    seen, memory, until = Seen(), [], time.monotonic() + seconds
    crowd = [client(server, number, until, expected, seen) for number in range(clients)]
    watcher = asyncio.create_task(watched(server, until, memory))
    await asyncio.gather(*crowd)
    await watcher
    await asyncio.gather(*(asked(server, (50, 0), leave_after=BURST_SECONDS) for _ in range(clients)))
    again = await recovery(server, usual)
    third = max(1, len(memory) // 3)
    return {
        "clients": clients,
        "seconds": seconds,
        "answers": dict(seen.answers),
        "pictures": len(seen.differences),
        "largest_difference": max(seen.differences, default=0),
        "different_pictures": sum(one > 0 for one in seen.differences),
        "p50_s": float(np.median(seen.seconds)),
        "p95_s": float(np.quantile(seen.seconds, 0.95)),
        "rss_first_third": float(np.mean(memory[:third])),
        "rss_last_third": float(np.mean(memory[-third:])),
        "rss_after": server.rss(),
        "recovery_s": again,
        "lone_10_steps_s": usual,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryFile("w") as log:
        server = started(given.engine, log, ["--max-queue", str(given.max_queue)])
        try:
            found = asyncio.run(measured(server, given.clients, given.seconds))
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            code = server.process.wait(60)
        finally:
            server.process.kill()
    found = {"ready_s": server.ready} | found | {"exit_code": code, "shutdown_s": time.monotonic() - start}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
