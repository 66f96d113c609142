"""From a denoiser's configuration to its graph, traced on the meta device: no weight is ever in memory here."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.families import apply_transforms, block_names, new_hot_denoiser

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from s2p_deploy.records import TimeTable, TransformSpec

OPSET = 21
INPUTS = ("sample", "step_index", "encoder_hidden_states")
OUTPUT = "noise_pred"


@dataclass(frozen=True)
class TracedDenoiser:
    """The graph, and the module paths of the denoiser's blocks."""

    model: ir.Model
    blocks: tuple[str, ...]


def trace_denoiser(
    config: dict[str, Any], table: TimeTable, transforms: TransformSpec, *, tokens: int, dtype: torch.dtype
) -> TracedDenoiser:
    """The transformed hot denoiser's graph as torch's exporter writes it; its initializers have shapes and no data.

    Inputs are ``sample`` [batch, C, H, W], ``step_index`` int64 [batch] and ``encoder_hidden_states``
    [batch, tokens, D]; the output is ``noise_pred``. Every node's metadata names the modules it came from.
    """
    with torch.device("meta"):
        denoiser = new_hot_denoiser(config, table).to(device="meta", dtype=dtype).eval()
        apply_transforms(denoiser, transforms)
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        examples = (
            torch.zeros(2, config["in_channels"], height, width, dtype=dtype),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, tokens, config["cross_attention_dim"], dtype=dtype),
        )
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            denoiser,
            examples,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=[OUTPUT],
            dynamic_shapes=({0: "batch"}, {0: "batch"}, {0: "batch"}),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return TracedDenoiser(program.model, block_names(denoiser))


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
