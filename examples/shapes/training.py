"""A resumable training loop for every network of the bundled pipelines.

All randomness of iteration ``i`` comes from a generator seeded with (seed, i), and everything else that the loop
carries is in one safetensors checkpoint: a killed run, started again, goes on where it was.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW at ``peak`` learning rate after a warm-up, cosine to zero, EMA of the weights."""

    iterations: int
    peak: float
    warmup: int = 200
    ema: float = 0.999
    weight_decay: float = 0.0
    seed: int = 0
    save_every: int = 250

    def rate(self, iteration: int) -> float:
        """Computes the learning rate at an iteration."""
        ramp = min(1.0, (iteration + 1) / self.warmup)
        return self.peak * ramp * 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))


def train(
    net: nn.Module, loss_of: Callable[[torch.Generator], Tensor], schedule: Schedule, checkpoint: Path
) -> dict[str, Tensor]:
    """Runs (or goes on with) a training and returns the EMA weights.

    ``loss_of(generator)`` draws a batch with the generator and returns a scalar loss with gradients for ``net``.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=schedule.peak, weight_decay=schedule.weight_decay)
    ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
    start = _restore(net, optimizer, ema, checkpoint)
    mean, began = None, time.monotonic()
    for iteration in range(start, schedule.iterations):
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + iteration)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(iteration)
        loss = loss_of(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(schedule.ema, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for name, value in net.state_dict().items():
                ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else ema[name].copy_(value)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (iteration + 1) % 50 == 0:
            pace = (time.monotonic() - began) / (iteration + 1 - start)
            print(
                f"{checkpoint.stem} {iteration + 1}/{schedule.iterations} loss {mean:.5f} {pace:.3f} s/it", flush=True
            )
        if (iteration + 1) % schedule.save_every == 0 or iteration + 1 == schedule.iterations:
            _save(net, optimizer, ema, iteration + 1, checkpoint)
    return ema


def last_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Loads the EMA weights of a checkpoint, whether or not its training has ended."""
    return {k[4:]: v for k, v in load_file(checkpoint).items() if k.startswith("ema.")}


def _save(
    net: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor], done: int, checkpoint: Path
) -> None:
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in ema.items()}
    for index, parameter in enumerate(net.parameters()):
        for key, value in optimizer.state[parameter].items():
            tensors[f"opt.{index}.{key}"] = value
    temporary = checkpoint.with_suffix(".tmp")
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, temporary, {"done": str(done)})
    os.replace(temporary, checkpoint)


def _restore(net: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor], checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    tensors = load_file(checkpoint)
    net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    ema.update({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    for index, parameter in enumerate(net.parameters()):
        prefix = f"opt.{index}."
        optimizer.state[parameter] = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    with safe_open(checkpoint, "pt") as opened:
        return int(opened.metadata()["done"])
