"""From a denoiser's configuration to its graph, traced on the meta device: no weight is ever in memory here."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from s2p_deploy.export.passes.time_projections import TIME_PROJECTIONS
from s2p_deploy.families import apply_transforms, given_features, hot_skeleton, time_slices, zero_inputs
from s2p_deploy.records import TimeTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from s2p_deploy.families import Block, HotDenoiser
    from s2p_deploy.records import TimestepTable, TransformSpec

Sizes = Literal["fixed", "dynamic"]
OPSET = 21
INPUTS = ("sample", "step_index", "encoder_hidden_states")
OUTPUT = "noise_pred"


@dataclass(frozen=True)
class TracedDenoiser:
    """The graph, and the denoiser's blocks."""

    model: ir.Model
    blocks: tuple[Block, ...]


def trace_denoiser(
    config: dict[str, Any],
    time: TimeTable | TimestepTable,
    transforms: TransformSpec,
    *,
    tokens: int,
    dtype: torch.dtype,
    sizes: Sizes = "fixed",
) -> TracedDenoiser:
    """The transformed hot denoiser's graph as torch's exporter writes it; its initializers have shapes and no data.

    Inputs are ``sample`` [batch, C, H, W], ``step_index`` int64 [batch] and ``encoder_hidden_states``
    [batch, tokens, D], without a table of features ``time_projections`` [batch, P] too; the output is ``noise_pred``.
    Every node's metadata names the modules it came from. With ``sizes`` dynamic, H and W are open: any multiples of
    what the network's kind asks for.
    """
    denoiser = hot_skeleton(config, time).hot.to(dtype=dtype).eval()
    apply_transforms(denoiser, transforms)
    step = denoiser.kind.size_multiple(config) if sizes == "dynamic" else None
    examples = _examples(denoiser, tokens, step)
    traced = denoiser if isinstance(time, TimeTable) else given_features(denoiser)
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            traced,
            examples,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=(*INPUTS, TIME_PROJECTIONS)[: len(examples)],
            output_names=[OUTPUT],
            dynamic_shapes=_open_dimensions(len(examples), step),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return TracedDenoiser(program.model, denoiser.kind.blocks(denoiser.network))


def _examples(denoiser: HotDenoiser, tokens: int, step: int | None) -> tuple[torch.Tensor, ...]:
    """Inputs of two samples; where the features depend on ``added_cond``, they stand in its place.

    With ``step`` the latents have another size than the trained one: no size that stays open may be 1 anywhere inside,
    and height and width differ.
    """
    inputs = zero_inputs(denoiser, tokens=tokens, batch=2).arguments()
    sample = inputs[0] if step is None else inputs[0].new_zeros(*inputs[0].shape[:2], 2 * step, 3 * step)
    if not denoiser.added_width:
        return sample, *inputs[1:3]
    width = max(stop for _, stop in time_slices(denoiser).values())
    return sample, *inputs[1:3], sample.new_zeros(2, width)


def _open_dimensions(inputs: int, step: int | None) -> tuple[dict[int, Any], ...]:
    """What the exporter may not fix: the batch, and with ``step`` the latents' height and width, multiples of it."""
    if step is None:
        return ({0: "batch"},) * inputs
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    return {0: batch, 2: step * height, 3: step * width}, *({0: batch},) * (inputs - 1)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silences what the exporter says about itself (missing torchvision, renamed dimensions, coming changes)."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
