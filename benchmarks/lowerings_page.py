"""Writes docs/lowerings.md from what ``lowering_overhead.py`` measured: ``python benchmarks/lowerings_page.py``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]

HEAD = """# Lowerings

A lowering is how a scale that depends on the row becomes ONNX, whose quantizers want constants. The exported graph
carries `rescale` everywhere; `build` derives each backend's graph from it with passes, one act point at a time, and the
engine records the lowering of every site. This page is written by `python benchmarks/lowerings_page.py`.

With x the activation, s the scale of the sample's row and c = √(s_min·s_max) of the column, a constant:

| lowering | form | batches |
|---|---|---|
| `rescale` | x·(c/s) → Q(c) → DQ(c) → op → ·(s/c) → + bias | every sample on its own row |
| `runtime_q` | Q(x, s) → DQ(c) → op → ·(s/c) → + bias | one row per batch |
| `static` | Q(c) → DQ(c) → op + bias | every sample on its own row |
| `weight_only` | op with dequantized weights | |
| `float` | op | |

All three give the codes that Q(s) gives, up to rounding: the op is linear and zero points are 0.

## Which one a site gets

1. `static`, where the point's scales vary over the rows by no more than `static_tolerance` (largest over smallest,
   less one; 0 by default: exactly constant). c is built in, the point's column leaves the graph, a convolution takes
   its bias back. An engine whose points are all static has no input `act_scales`.
2. What the build asks for: `auto` (the default), `rescale` or `runtime_q`. `auto` is `rescale`, unless the probe saw
   the installed version refuse that and take `runtime_q` (see [support.md](support.md)). A lowering that the probe saw
   refused is an error before the build starts.

The choice is a function of the graph's record, the options and the probe's table; validation gives every block the
lowerings of the engine. Quantizers of `runtime_q` take the first sample's scale, so such an engine refuses a batch of
mixed rows. A table whose column differs from what a static point has built in is refused when it is bound. No lowering
puts a scale that is computed at run time on a DequantizeLinear: before a convolution that kills TensorRT-RTX's builder.

## INT4 weights

INT4 stays packed where the installed version was seen to take it and nothing is lost by it, and is expanded to INT8
with the same codes elsewhere: ONNX Runtime and OpenVINO keep it packed beside floating-point activations only, because
beside INT8 activations they would compute in floating point; TensorRT keeps it wherever it builds. A version that the
probe knows nothing about gets what its predecessors took.

## Range of FP16

Before it is scaled back, the result of a quantized op is at most

    -qmin · c · max over output channels of Σ|w|

for any input and any row. A half-precision export computes this for every site, from the weights' scales alone where
that is enough; a site beyond 65,504 less 1 % is exported with float32 around it: its codes are dequantized to float32,
op and ·(s/c) are float32, and the result is cast back before the bias. The exported graph lists such sites as
`full_sites`. Models seen so far have none.

## Attention

OpenVINO compiles the exported form (two scaled operands, product, softmax, product) into one kernel by itself, in f32
and in bf16. In bf16 that kernel is faster where the queries alone are scaled and where heads are as wide as its tiles:
the graph gets that form ([engines.md](engines.md) has what each is worth). ONNX Runtime fuses nothing here; with the
hint `fast` the attention becomes `com.microsoft.MultiHeadAttention`, which never holds all scores. The hint `reference`
keeps the graph as it is.

## Gated layers

A GEGLU multiplies by one matrix and cuts the result in two. For OpenVINO it becomes two products that read the same
codes: the same values to the bit, without the copy that its Split is. A whole step of SD v1-4 went from 1.31 to 1.17 s
(medians of two runs beside the same rivals, see [engines.md](engines.md)).

## Measured cost

Engines of one graph that differ only in their lowering, run in turn, some steps each a round; ratios of processor
seconds to `static` in the same round, median and quartiles, on a machine shared with other work. `rescale` is meant to
stay within {limit:.2f} times `static`. OpenVINO computes sites of `runtime_q` in floating point: a quantizer whose
scale is not a constant is no INT8 to it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("results") / "lowering_overhead.json"
    parser.add_argument("--results", type=Path, default=default)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "lowerings.md")
    asked = parser.parse_args()
    asked.out.write_text(page(json.loads(asked.results.read_text(encoding="utf-8"))), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    return "\n".join([HEAD.format(limit=results["limit"]), *lines(results)]) + "\n"


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The table, and what it was measured with."""
    yield "| network | batch | backend | hint | lowering | ms per step | to `static` |"
    yield "|---|---|---|---|---|---|---|"
    for row in results["rows"]:
        ratio = row["cpu_ratio"]
        spread = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        what = (row[key] for key in ("case", "batch", "backend", "hint", "lowering"))
        cells = (*what, f"{row['cpu_ms']:.1f}", spread)
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    yield "`bundled` is the bundled UNet, `sd14_block` one block of Stable Diffusion v1-4's first resolution."
    yield _on(results["machine"])


def _on(machine: dict[str, str]) -> str:
    versions = f"ONNX Runtime {machine['onnxruntime']}, OpenVINO {machine['openvino']}"
    return f"One thread, {machine['processor']}, {versions}."


if __name__ == "__main__":
    main()
