"""One attention in the forms that a graph can give it: what OpenVINO makes of each on a CPU with bfloat16.

    python -m benchmarks.engines.attention_forms [--tokens 4096 1024] [--heads 8] [--width 40] [--rounds 12]

The default is the widest self-attention of Stable Diffusion v1-4, batch 2: five such layers are half of an INT8 step.
The forms take turns in one process; the figures go into ``results/attention_forms.json`` and from there into
docs/measured/full-size.md by ``pages/write.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import openvino
import openvino.opset13 as op

from s2p_deploy.bench.result import this_machine
from s2p_deploy.bench.turns import in_turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvino import Node

PRECISION = "bf16"
BATCH = 2
TILE = 32  # bfloat16 values in a row of an AMX tile


class Sizes(NamedTuple):
    """Tokens, heads and the width of each of one attention."""

    tokens: int
    heads: int
    width: int


class Form(NamedTuple):
    """How queries, keys [B, H, T, W] and values [B, H, T, V] become [B, H, T, V], and which are padded to whole tiles.

    ``about`` is what the page calls it.
    """

    about: str
    core: Callable[[Node, Node, Node, float], Node]
    padded: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 1024])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "attention_forms.json")
    asked = parser.parse_args()
    runs = [timed_forms(Sizes(tokens, asked.heads, asked.width), asked.rounds) for tokens in asked.tokens]
    found = {"machine": this_machine().model_dump(), "precision": PRECISION, "batch": BATCH, "runs": runs}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=1))


def timed_forms(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Milliseconds of every form in turns after one run that is not measured."""
    random = np.random.default_rng(0)
    shape = (BATCH, sizes.tokens, sizes.heads * sizes.width)
    inputs = [random.standard_normal(shape, dtype=np.float32) for _ in range(3)]
    requests = [compiled(form, sizes, PRECISION) for form in FORMS]
    spent: list[list[float]] = [[] for _ in FORMS]
    for request in requests:
        request.infer(inputs)

    def visit(member: int, _: int) -> None:
        start = time.perf_counter()
        requests[member].infer(inputs)
        spent[member].append((time.perf_counter() - start) * 1e3)

    in_turns(len(FORMS), rounds, visit)
    forms = [
        {"about": form.about, "best_ms": min(found), "median_ms": float(np.median(found))}
        for form, found in zip(FORMS, spent, strict=True)
    ]
    return sizes._asdict() | {"forms": forms}


def compiled(form: Form, sizes: Sizes, precision: str) -> openvino.InferRequest:
    """Queries, keys and values [B, T, H*D] -> [B, T, H*D] in one form."""
    tokens, heads, width = sizes
    inputs = {name: op.parameter([BATCH, tokens, heads * width], np.float32, name=name) for name in "qkv"}

    def split(name: str) -> Node:
        apart = op.reshape(inputs[name], _axes(BATCH, tokens, heads, width), False)
        if name in form.padded:
            apart = op.pad(apart, _axes(0, 0, 0, 0), _axes(0, 0, 0, -width % TILE), "constant", _floats(0.0))
        return op.transpose(apart, _axes(0, 2, 1, 3))

    result = op.transpose(form.core(*(split(name) for name in "qkv"), width**-0.5), _axes(0, 2, 1, 3))
    if "v" in form.padded:
        result = op.slice(result, _axes(0), _axes(width), _axes(1), _axes(3))
    flat = op.reshape(result, _axes(BATCH, tokens, heads * width), False)
    properties = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Model([flat], list(inputs.values()))
    return openvino.Core().compile_model(model, "CPU", properties).create_infer_request()


def both_scaled(q: Node, k: Node, v: Node, scale: float) -> Node:
    """As torch's exporter writes it: each operand of the scores carries the root of the scale."""
    keys = op.multiply(op.transpose(k, _axes(0, 1, 3, 2)), _floats(scale**0.5))
    scores = op.matmul(op.multiply(q, _floats(scale**0.5)), keys, False, False)
    return op.matmul(op.softmax(scores, 3), v, False, False)


def queries_scaled(q: Node, k: Node, v: Node, scale: float) -> Node:
    """As ``engines/passes/scaled_queries.py`` leaves it."""
    return op.matmul(op.softmax(_scores(q, k, scale), 3), v, False, False)


def operator(q: Node, k: Node, v: Node, scale: float) -> Node:
    """OpenVINO's own."""
    return op.scaled_dot_product_attention(q, k, v, attention_mask=_floats(0.0), scale=_floats(scale))


def divided_last(q: Node, k: Node, v: Node, scale: float) -> Node:
    """Divided by the sums after the values, on a hundredth of the numbers."""
    scores = _scores(q, k, scale)
    powers = op.exp(op.subtract(scores, op.reduce_max(scores, _axes(3), True)))
    return op.divide(op.matmul(powers, v, False, False), op.reduce_sum(powers, _axes(3), True))


def without_softmax(q: Node, k: Node, v: Node, scale: float) -> Node:
    """Not an attention: what its two products take."""
    return op.matmul(op.relu(_scores(q, k, scale)), v, False, False)


FORMS = (
    Form("as exported: queries and keys scaled", both_scaled),
    Form("queries alone scaled", queries_scaled),
    Form("both scaled, both padded", both_scaled, "qk"),
    Form("queries alone scaled, both padded (ours)", queries_scaled, "qk"),
    Form("ours, values padded too", queries_scaled, "qkv"),
    Form("OpenVINO's ScaledDotProductAttention, padded as ours", operator, "qk"),
    Form("ours, divided after the values", divided_last, "qk"),
    Form("ours with ReLU for the softmax (no attention)", without_softmax, "qk"),
)


def _scores(q: Node, k: Node, scale: float) -> Node:
    return op.matmul(op.multiply(q, _floats(scale)), k, False, True)


def _axes(*values: int) -> Node:
    return op.constant(np.asarray(values, np.int64))


def _floats(value: float) -> Node:
    return op.constant(np.asarray(value, np.float32))


if __name__ == "__main__":
    main()
