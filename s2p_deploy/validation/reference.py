"""What a denoiser sees inside, call by call: the inputs of sites, the inputs and outputs of blocks.

:func:`reference_calls` watches the fake-quant denoiser; :func:`forced_outputs` puts what it saw into another one, so
that every part of that one is given the reference's activations and no error piles up.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.families import apply_transforms, new_hot_denoiser

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.families import HotDenoiser, Tap
    from s2p_deploy.records import CalibratedModel
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


def unquantized_denoiser(calibrated: CalibratedModel) -> HotDenoiser:
    """A calibrated model before anything is quantized: its trained weights, float32, in evaluation mode.

    Weights that are kept as codes are on their grid already.
    """
    config = json.loads((calibrated.folder / "denoiser_config.json").read_text(encoding="utf-8"))
    hot = new_hot_denoiser(config, calibrated.time_source())
    apply_transforms(hot, calibrated.transforms)
    hot.load_state_dict({name: torch.from_numpy(value) for name, value in calibrated.weights().items()})
    return hot.eval().requires_grad_(requires_grad=False)


def forced_outputs(
    hot: HotDenoiser, call: ReferenceCall, entering: Collection[Tap], leaving: Collection[Tap]
) -> dict[Tap, NDArray[np.float32]]:
    """What ``hot`` gives at the taps ``leaving`` where every tap ``entering`` is given what ``call`` saw there.

    float32 [batch, ...] each. The activation is overwritten in place: whoever else holds it, such as a residual sum
    beside the module, has the reference's from then on too.
    """
    forced = _Forced(call, frozenset(entering))
    found: dict[Tap, NDArray[np.float32]] = {}
    with ExitStack() as hooks, torch.no_grad():
        for tap in dict.fromkeys((*entering, *leaving)):
            _hook(hot.network.get_submodule(tap.module), tap, forced.into(tap, found), hooks)
        hot(*(torch.from_numpy(value.copy()) for value in call.latents.inputs().values()))
    return {tap: found[tap] for tap in leaving}


class _Forced:
    """Overwrites activations once each, and remembers what they were: two taps may look at one tensor."""

    def __init__(self, call: ReferenceCall, entering: frozenset[Tap]) -> None:
        self._call, self._entering = call, entering
        self._before: list[tuple[torch.Tensor, NDArray[np.float32]]] = []

    def into(self, tap: Tap, found: dict[Tap, NDArray[np.float32]]) -> Callable[[torch.Tensor], None]:
        def see(tensor: torch.Tensor) -> None:
            before = next((value for seen, value in self._before if seen is tensor), None)
            found[tap] = tensor.numpy().copy() if before is None else before
            if tap in self._entering and before is None:
                self._before.append((tensor, found[tap]))
                tensor.copy_(torch.from_numpy(self._call.seen[tap]))

        return see


def _watch(fake_quant: FakeQuantDenoiser, tap: Tap, call: ReferenceCall, hooks: ExitStack) -> None:
    def see(tensor: torch.Tensor) -> None:
        call.seen[tap] = tensor.numpy().copy()

    _hook(fake_quant.site(tap.module), tap, see, hooks)


def _hook(module: torch.nn.Module, tap: Tap, see: Callable[[torch.Tensor], None], hooks: ExitStack) -> None:
    def enter(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        see(args[0])

    def leave(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - a tensor or a tuple
        see(output[0] if isinstance(output, tuple) else output)

    hook = module.register_forward_pre_hook(enter) if tap.side == "input" else module.register_forward_hook(leave)
    hooks.callback(hook.remove)
