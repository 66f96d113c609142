"""Losses on features: what sensitive sites or whole blocks answer, against the teacher's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from s2p_deploy.calib.training.setting import TrainingSetting
    from s2p_deploy.families import HotDenoiser

DELTA = 1e-6  # keeps a relative error finite where the teacher's feature is zero


def feature_targets(setting: TrainingSetting, hot: HotDenoiser) -> tuple[str, ...]:
    """Module paths in the network whose outputs are compared; none where the recipe has no feature loss."""
    targets = setting.training.features.targets
    if targets == "blocks":
        return tuple(name for name, _ in hot.network.named_modules() if hot.kind.distilled.fullmatch(name))
    return setting.sensitive if targets == "sensitive" else ()


@contextmanager
def tapped(hot: HotDenoiser, targets: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Within, a forward pass leaves the outputs of ``targets`` in the dictionary; of a block's tuple, the image's."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[name] = output if isinstance(output, torch.Tensor) else output[hot.kind.image_output]

        return hook

    hooks = [hot.network.get_submodule(name).register_forward_hook(keep(name)) for name in targets]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def feature_loss(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, relative: bool) -> Tensor:
    """Mean over the targets of their squared error, float32 [].

    ``relative`` divides each sample's squared error by the teacher's square plus 1e-6; otherwise it is the mean over
    the elements (L_sen of the paper).
    """
    losses = []
    for name, reference in wanted.items():
        goal = reference.float()
        error = (found[name].float() - goal).square()
        if relative:
            losses.append((error.flatten(1).sum(1) / (goal.square().flatten(1).sum(1) + DELTA)).mean())
        else:
            losses.append(error.mean())
    return torch.stack(losses).mean()
