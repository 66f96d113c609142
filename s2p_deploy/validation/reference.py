"""What the fake-quant denoiser sees inside, call by call: the inputs of sites, the inputs and outputs of blocks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.families import Tap
    from s2p_deploy.validation.latents import ValidationLatents


@dataclass(frozen=True)
class ReferenceCall:
    """One call: its ``latents``, their rows' ``time_projections`` float32 [batch, P], and activations by tap.

    ``seen`` activations are float32 [batch, ...].
    """

    latents: ValidationLatents
    time_projections: NDArray[np.float32]
    seen: dict[Tap, NDArray[np.float32]] = field(default_factory=dict)


def reference_calls(
    fake_quant: FakeQuantDenoiser, latents: ValidationLatents, taps: Iterable[Tap]
) -> Iterator[ReferenceCall]:
    """Runs the reference over all latents, few at a time, and gives what there is to see at every tap."""
    wanted = tuple(dict.fromkeys(taps))
    for part in latents.parts():
        rows, added = torch.from_numpy(part.rows), torch.from_numpy(part.added_cond)
        with ExitStack() as hooks, torch.no_grad():
            call = ReferenceCall(part, fake_quant.denoiser.hot.time(rows, added).numpy())
            for tap in wanted:
                _watch(fake_quant, tap, call, hooks)
            fake_quant(*(torch.from_numpy(value) for value in part.inputs().values()))
        yield call


def _watch(fake_quant: FakeQuantDenoiser, tap: Tap, call: ReferenceCall, hooks: ExitStack) -> None:
    def enter(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        call.seen[tap] = args[0].numpy().copy()

    def leave(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - a tensor or a tuple
        tensor = output[0] if isinstance(output, tuple) else output
        call.seen[tap] = tensor.numpy().copy()

    module = fake_quant.site(tap.module)
    hook = module.register_forward_pre_hook(enter) if tap.side == "input" else module.register_forward_hook(leave)
    hooks.callback(hook.remove)
