"""Batch sizes of an engine for which none were asked: what its GPU has memory for, derived from the graph's sizes.

The smallest is 1, and it is tuned for 2, a picture with guidance. The largest is the largest power of two with

    weights + batch x 4 x the largest tensor of one sample  <=  85 % of the memory that is free,

between 4 and 32, and at most so many that a step has 262,144 latent positions: beyond that, larger batches make a GPU
no faster. The largest tensor is an attention's scores. Where attention is fused it never exists; where it is not, it
lives at the same time as its softmax, and the factor leaves as much again for everything else. Memory is taken for the
shapes that are run, so a largest batch that would not fit costs nothing, and 4, two pictures with guidance, is always
allowed. Ahead of time a GPU with 8 GB free is assumed. So with fp16 weights:

    | free     | SD v1-4 | SDXL   |
    |----------|---------|--------|
    | 8 GB     | 1:2:4   | 1:2:4  |
    | 24 GB    | 1:2:16  | 1:2:8  |
    | 80 GB    | 1:2:32  | 1:2:16 |

A backend on a CPU takes any batch: there, 1:2:32 says only what it is tuned for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.engines.machine import free_gpu_memory
from s2p_deploy.engines.onnx_files import read_onnx
from s2p_deploy.records import ShapeProfile

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.records import Execution, ExportedGraph

ASSUMED_FREE = 8 * 10**9  # bytes, of a GPU that is not here
_SHARE = 0.85
_LIVE = 4  # times the largest tensor
_LEAST, _MOST = 4, 32
_MOST_POSITIONS = 2**18


@dataclass(frozen=True)
class DefaultProfile:
    """A profile that was derived, and of what, for people; nothing to say of it where any batch is taken."""

    profile: ShapeProfile
    reason: str

    def __str__(self) -> str:
        sizes = f"{self.profile.minimum}:{self.profile.optimum}:{self.profile.maximum}"
        return f"batches of {sizes}, {self.reason} (--batch sets others)"


def default_profile(graph: ExportedGraph, backend: Backend, execution: Execution, device: str) -> DefaultProfile:
    """Derives the batch sizes of an engine of ``graph``, which will run so on a context's ``device``.

    Raises:
        IntegrityError: the graph is not what its artifact says.
    """
    if backend.environment(execution, device)["device"] == "cpu":
        return DefaultProfile(ShapeProfile(), "")
    free = free_gpu_memory(device)
    weights = sum(path.stat().st_size for path in graph.folder.glob("denoiser.onnx*"))
    model = read_onnx(graph.folder, graph.onnx_file.name, graph.manifest.files)
    sizes = latent_sizes(graph)
    positions = math.prod(sizes.values())
    tokens = {} if graph.chunks is None else {"tokens": graph.chunks.most_tokens}
    each = _LIVE * largest_tensor(model, sizes | tokens)
    largest = largest_batch(ASSUMED_FREE if free is None else free, weights, each, positions)
    where = "for a GPU with 8 GB, as there is none here" if free is None else f"for the {free / 1e9:.3g} GB free here"
    return DefaultProfile(
        ShapeProfile(1, 2, largest), f"{where}: weights {weights / 1e9:.2g} GB, a sample up to {each / 1e9:.2g} GB"
    )


def largest_batch(free: int, weights: int, each: int, positions: int) -> int:
    """Returns the largest batch for so many bytes of free memory, of weights and of every sample: a power of two."""
    fitting = int((_SHARE * free - weights) // max(each, 1))
    return _power_of_two(max(_LEAST, min(fitting, _MOST, max(1, _MOST_POSITIONS // positions))))


def latent_sizes(graph: ExportedGraph) -> dict[str, int]:
    """Returns the height and width of the latents that a network was trained on."""
    trained = graph.manifest.content.get("latents")
    if trained is not None:
        return {side: int(trained[side]) for side in ("height", "width")}
    height, width = next(spec.shape[2:] for spec in graph.inputs if spec.name == "sample")
    return {"height": int(height), "width": int(width)}


def largest_tensor(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of the largest tensor that a sample of a batch has in a graph, with open sizes by name.

    Graphs leave sizes without a name open: some of an attention's scores, and inner ones where the picture's size or
    the number of the text's tokens is open. In scores there are as many queries as latent positions and open tokens
    then, and as many keys as queries; other tensors with such a size do not count.
    """
    tensors = (
        (math.prod(_sizes_of_a_sample(node.op_type, value.shape, sizes)), value.dtype.bitwidth)
        for node in model.graph
        for value in node.outputs
        if value.shape and value.dtype is not None
    )
    return max((count * bits // 8 for count, bits in tensors), default=0)


def _sizes_of_a_sample(op: str, shape: ir.Shape, sizes: Mapping[str, int]) -> list[int]:
    """Returns the sizes of a tensor but the batch; 0 for one that is not known, and for a tensor without a batch."""
    batch, *inner = (size if isinstance(size, int) else size.value for size in shape)
    known = [size if isinstance(size, int) else sizes.get(str(size), 0) for size in inner]
    if op == "Softmax" and len(known) > 1:  # an attention's scores: batch, heads, queries, keys
        *heads, queries, keys = known
        queries = queries or sizes["height"] * sizes["width"] + sizes.get("tokens", 0)
        return [*heads, queries, keys or queries]
    return known if batch == "batch" else [0]


def _power_of_two(size: int) -> int:
    return 1 << (size.bit_length() - 1)
