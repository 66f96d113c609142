"""Traces networks to ONNX; a denoiser from its configuration, on the meta device, with no weight in memory."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from s2p_deploy.export.passes.time_projections import TIME_PROJECTIONS
from s2p_deploy.families import apply_transforms, indexed_skeleton, zero_inputs
from s2p_deploy.records import TimeTable
from s2p_deploy.records.optional_inputs import fraction_of, open_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir

    from s2p_deploy.families import Block, IndexedDenoiser
    from s2p_deploy.families.model_family import Shape
    from s2p_deploy.records import TimestepTable, TransformSpec

Sizes = Literal["fixed", "dynamic"]
OPSET = 21
INPUTS = ("sample", "timestep_index", "encoder_hidden_states")
OUTPUT = "noise_pred"


@dataclass(frozen=True)
class TracedDenoiser:
    """A denoiser's graph, and its blocks; the inputs of adapters by name with their shapes."""

    model: ir.Model
    blocks: tuple[Block, ...]
    optional: dict[str, Shape] = field(default_factory=dict)


def trace(
    module: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    open_sizes: Sequence[Any],
    named: Mapping[str, Any] | None = None,
) -> ir.Model:
    """Traces a module to ONNX as torch's exporter writes it.

    Args:
        module: what to trace, on the examples' device; on the meta device its initializers have shapes and no data.
        examples: its positional arguments.
        inputs: their names in the graph.
        outputs: the names of its results.
        open_sizes: of every argument the names of the dimensions that stay open, by axis.
        named: keyword arguments; those of several tensors by name count as many among the inputs.
    """
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            examples,
            kwargs=dict(named or {}),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(open_sizes),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program.model


def trace_denoiser(  # noqa: PLR0913 - all but three by keyword
    config: dict[str, Any],
    time: TimeTable | TimestepTable,
    transforms: TransformSpec,
    *,
    tokens: int,
    dtype: torch.dtype,
    sizes: Sizes = "fixed",
    open_tokens: bool = False,
    controlnet: bool = False,
) -> TracedDenoiser:
    """Traces the transformed indexed denoiser; its initializers have shapes and no data.

    Inputs are ``sample`` [batch, C, H, W], ``timestep_index`` int64 [batch] and ``encoder_hidden_states``
    [batch, tokens, D], without a table of features ``time_projections`` [batch, P] too; the output is ``noise_pred``.
    Every node's metadata names the modules it came from. With ``sizes`` dynamic, H and W are open: any multiples of
    what the network's kind asks for. With ``open_tokens`` the text may have any number of tokens. With ``controlnet``
    the residuals of a ControlNet are inputs too, behind the others.
    """
    denoiser = indexed_skeleton(config, time).denoiser.to(dtype=dtype).eval()
    apply_transforms(denoiser, transforms)
    step = denoiser.family.size_multiple(config) if sizes == "dynamic" else None
    examples = _examples(denoiser, 2 * tokens + 1 if open_tokens else tokens, step)
    traced = denoiser if isinstance(time, TimeTable) else denoiser.with_given_features()
    optional = denoiser.family.residual_inputs(denoiser.network) if controlnet else {}
    names = (*INPUTS, TIME_PROJECTIONS)[: len(examples)]
    batch, _, height, width = examples[0].shape
    at = {"batch": batch, "height": height, "width": width}
    given = {name: examples[0].new_zeros([_size_at(size, at) for size in shape]) for name, shape in optional.items()}
    model = trace(
        traced,
        examples,
        (*names, *optional),
        [OUTPUT],
        _open_dimensions(len(examples), step, optional, open_tokens=open_tokens),
        {"optional": given} if optional else None,
    )
    return TracedDenoiser(model, denoiser.family.blocks(denoiser.network), optional)


def _size_at(size: int | str, sizes: Mapping[str, int]) -> int:
    known = size if isinstance(size, int) else open_size(size, sizes)
    assert known is not None, "optional inputs follow the latents"
    return known


def _examples(denoiser: IndexedDenoiser, tokens: int, step: int | None) -> tuple[torch.Tensor, ...]:
    """Makes inputs of two samples; where the features depend on ``added_cond``, they are in its place.

    With ``step`` the latents have another size than the trained one: no size that stays open may be 1 anywhere inside,
    and height and width differ.
    """
    inputs = zero_inputs(denoiser, tokens=tokens, batch=2).arguments()
    sample = inputs[0] if step is None else inputs[0].new_zeros(*inputs[0].shape[:2], 2 * step, 3 * step)
    if not denoiser.added_width:
        return sample, *inputs[1:3]
    width = max(stop for _, stop in denoiser.time_slices().values())
    return sample, *inputs[1:3], sample.new_zeros(2, width)


def _open_dimensions(
    inputs: int, step: int | None, optional: Mapping[str, Shape], *, open_tokens: bool
) -> tuple[dict[Any, Any], ...]:
    """Returns the dimensions that stay open: the batch, with ``step`` height and width, multiples of it, and tokens.

    Behind those of the ``inputs`` are those of the ``optional`` ones by name, where there are any.
    """
    if step is None and not open_tokens:
        named = ({name: {0: "batch"} for name in optional},) if optional else ()
        return ({0: "batch"},) * inputs + named
    batch, height, width, tokens = (torch.export.Dim(name) for name in ("batch", "height", "width", "tokens"))
    sides = {} if step is None else {"height": (height, step), "width": (width, step)}

    def follows(size: int | str) -> Any:  # noqa: ANN401 - a dimension of the exporter
        whole, divisor = fraction_of(str(size))
        if whole not in sides:
            return None
        side, multiple = sides[whole]
        return (multiple // divisor) * side

    def opened(shape: Shape) -> dict[int, Any]:
        axes = {axis: follows(size) for axis, size in enumerate(shape)}
        return {0: batch} | {axis: size for axis, size in axes.items() if size is not None}

    sample = opened(("batch", 0, "height", "width"))
    text = {0: batch, 1: tokens} if open_tokens else {0: batch}
    others = ({name: opened(shape) for name, shape in optional.items()},) if optional else ()
    return sample, {0: batch}, text, *({0: batch},) * (inputs - 3), *others


@contextmanager
def _quiet_exporter() -> Iterator[None]:
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
