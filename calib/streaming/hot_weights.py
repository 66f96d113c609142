"""The tensors of a hot denoiser, read from the pipeline's own weights one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.streaming.tensor_file import TensorForm
from s2p_deploy.errors import InputError
from s2p_deploy.records.calibrated_model import parameter_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from s2p_deploy.calib.streaming.checkpoint import Checkpoint


@dataclass(frozen=True)
class Piece:
    """What a tensor of the hot denoiser is: one of the pipeline's, or some of its input channels (axis 1)."""

    source: str
    channels: tuple[int, int] | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, where the pipeline's tensor has the shape ``whole``."""
        if self.channels is None or len(whole) < 2:
            return whole
        start, stop = self.channels
        return (whole[0], max(0, min(stop, whole[1]) - start), *whole[2:])

    def of(self, whole: Tensor) -> Tensor:
        """It, from the pipeline's tensor."""
        if self.channels is None:
            return whole
        return whole[:, slice(*self.channels)].clone(memory_format=torch.contiguous_format)


def split_pieces(
    sources: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], split: Mapping[str, int]
) -> dict[str, Piece]:
    """The pieces of a denoiser whose convolutions ``split`` became two; ``sources`` and ``shapes`` are from before.

    See :class:`~s2p_deploy.families.SplitConv2d`: ``head`` has the leading input channels and the bias.
    """
    found = {name: Piece(source) for name, source in sources.items()}
    for path, leading in split.items():
        whole = parameter_name(f"{path}.weight")
        source = found.pop(whole).source
        found[parameter_name(f"{path}.head.weight")] = Piece(source, (0, leading))
        found[parameter_name(f"{path}.skip.weight")] = Piece(source, (leading, shapes[whole][1]))
        bias = found.pop(parameter_name(f"{path}.bias"), None)
        if bias is not None:
            found[parameter_name(f"{path}.head.bias")] = bias
    return found


class HotWeights:
    """Tensors by the names in the hot denoiser's state, each in the dtype that the pipeline has it in."""

    def __init__(
        self, checkpoint: Checkpoint, pieces: Mapping[str, Piece], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Checks every tensor's presence, dtype and shape; reads none.

        ``shapes`` are those of the hot denoiser's state.

        Raises:
            InputError: a tensor is missing, of another shape than the configuration's, or not in floating point.
        """
        assert pieces.keys() == shapes.keys(), "one piece for every tensor of the state"
        self._checkpoint, self._pieces = checkpoint, pieces
        self.forms = {name: self._form(name, shapes[name]) for name in pieces}

    def read(self, name: str) -> Tensor:
        """A contiguous tensor on the CPU. Raises InputError as :meth:`Checkpoint.read`."""
        piece = self._pieces[name]
        return piece.of(self._checkpoint.read(piece.source))

    def _form(self, name: str, wanted: tuple[int, ...]) -> TensorForm:
        piece = self._pieces[name]
        stored = self._checkpoint.form(piece.source)
        if piece.shape(stored.shape) != wanted:
            raise InputError(
                f"{self._checkpoint.folder}: {piece.source} is {list(stored.shape)}, which does not fit config.json:"
                " the weights are of another model"
            )
        return TensorForm(stored.dtype, wanted)
