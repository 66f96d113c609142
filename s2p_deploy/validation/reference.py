"""What the fake-quant denoiser sees inside, call by call: the inputs of sites, the inputs and outputs of blocks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.validation.latents import ValidationLatents


@dataclass(frozen=True)
class Border:
    """The modules whose input enters a region and whose output leaves it."""

    first: str
    last: str


@dataclass(frozen=True)
class ReferenceCall:
    """One call: its ``latents``, their rows' ``time_projections`` float32 [batch, P], and activations by region.

    ``entering`` and ``leaving`` activations are float32 [batch, ...].
    """

    latents: ValidationLatents
    time_projections: NDArray[np.float32]
    entering: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    leaving: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def reference_calls(
    fake_quant: FakeQuantDenoiser, latents: ValidationLatents, regions: Mapping[str, Border]
) -> Iterator[ReferenceCall]:
    """Runs the reference over all latents, few at a time, and gives what enters and leaves every region."""
    for part in latents.parts():
        projections = fake_quant.site("time_proj")(torch.from_numpy(part.rows))
        call = ReferenceCall(part, projections.numpy())
        with ExitStack() as hooks, torch.no_grad():
            for name, border in regions.items():
                _watch(fake_quant, name, border, call, hooks)
            fake_quant(*(torch.from_numpy(value) for value in part.inputs().values()))
        yield call


def _watch(fake_quant: FakeQuantDenoiser, name: str, border: Border, call: ReferenceCall, hooks: ExitStack) -> None:
    def enter(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        call.entering[name] = args[0].numpy().copy()

    def leave(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - a tensor or a tuple
        tensor = output[0] if isinstance(output, tuple) else output
        call.leaving[name] = tensor.numpy().copy()

    first, last = fake_quant.site(border.first), fake_quant.site(border.last)
    hooks.callback(first.register_forward_pre_hook(enter).remove)
    hooks.callback(last.register_forward_hook(leave).remove)
