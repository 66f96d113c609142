"""One attention in the forms that a graph can give it: what OpenVINO makes of each on a CPU with bfloat16.

    python benchmarks/attention_forms.py [--tokens 4096 1024] [--heads 8] [--width 40] [--rounds 10]

The default is the widest self-attention of Stable Diffusion v1-4, batch 2: five such layers are half of an INT8 step.
The forms take turns in one process; the figures go into ``results/attention_forms.json`` and from there into
docs/engines.md by ``engines_page.py``.
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

from s2p_deploy.bench.machine import this_machine
from s2p_deploy.bench.turns import in_turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvino import Node

HINT = "bf16"
BATCH = 2
TILE = 32  # bfloat16 values in a row of an AMX tile


class Sizes(NamedTuple):
    """Tokens, heads and the width of each of one attention."""

    tokens: int
    heads: int
    width: int

    @property
    def padded(self) -> int:
        """The width up to whole AMX tiles."""
        return self.width + -self.width % TILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 1024])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "attention_forms.json")
    asked = parser.parse_args()
    runs = [timed_forms(Sizes(tokens, asked.heads, asked.width), asked.rounds) for tokens in asked.tokens]
    found = {"machine": this_machine().model_dump(), "hint": HINT, "batch": BATCH, "runs": runs}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=1))


def timed_forms(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Milliseconds of every form in turns, and how far its result is from the first one's in dB."""
    random = np.random.default_rng(0)
    shape = (BATCH, sizes.tokens, sizes.heads * sizes.width)
    inputs = [random.standard_normal(shape, dtype=np.float32) for _ in range(3)]
    requests = {name: _compiled(form(sizes), HINT) for name, form in FORMS.items()}
    exact = _compiled(plain(sizes), "f32").infer(inputs)[0]
    errors = {name: sqnr_db(exact, request.infer(inputs)[0]) for name, request in requests.items()}
    spent: dict[str, list[float]] = {name: [] for name in requests}
    names = list(requests)

    def visit(member: int, _: int) -> None:
        start = time.perf_counter()
        requests[names[member]].infer(inputs)
        spent[names[member]].append((time.perf_counter() - start) * 1e3)

    in_turns(len(names), rounds, visit)
    forms = {
        name: {"best_ms": min(found), "median_ms": float(np.median(found)), "sqnr_db": errors[name]}
        for name, found in spent.items()
    }
    return sizes._asdict() | {"forms": forms}


def sqnr_db(exact: np.ndarray, found: np.ndarray) -> float:
    """Signal over error; float32's own attention is the signal."""
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum()))


def plain(sizes: Sizes) -> openvino.Model:
    """Scores, softmax, values: what the exporter writes."""
    return _attention(sizes, sizes.width, lambda q, k, v: op.matmul(_softmax(_scores(sizes, q, k)), v, False, False))


def padded(sizes: Sizes) -> openvino.Model:
    """The same with heads padded to whole tiles: what ``engines/passes/padded_heads.py`` makes of it."""
    return _attention(sizes, sizes.padded, lambda q, k, v: op.matmul(_softmax(_scores(sizes, q, k)), v, False, False))


def operator(sizes: Sizes) -> openvino.Model:
    """OpenVINO's ScaledDotProductAttention."""

    def core(q: Node, k: Node, v: Node) -> Node:
        no_mask, scale = _floats(0.0), _floats(sizes.width**-0.5)
        return op.scaled_dot_product_attention(q, k, v, attention_mask=no_mask, scale=scale)

    return _attention(sizes, sizes.width, core)


def divided_last(sizes: Sizes) -> openvino.Model:
    """Divided by the sums after the values, on a hundredth of the numbers."""

    def core(q: Node, k: Node, v: Node) -> Node:
        scores = _scores(sizes, q, k)
        powers = op.exp(op.subtract(scores, op.reduce_max(scores, _axes(3), True)))
        return op.divide(op.matmul(powers, v, False, False), op.reduce_sum(powers, _axes(3), True))

    return _attention(sizes, sizes.padded, core)


def without_maximum(sizes: Sizes) -> openvino.Model:
    """Divided last, and no maximum subtracted (which overflows for scores beyond 88)."""

    def core(q: Node, k: Node, v: Node) -> Node:
        powers = op.exp(_scores(sizes, q, k))
        return op.divide(op.matmul(powers, v, False, False), op.reduce_sum(powers, _axes(3), True))

    return _attention(sizes, sizes.padded, core)


FORMS: dict[str, Callable[[Sizes], openvino.Model]] = {
    "plain": plain,
    "padded": padded,
    "operator": operator,
    "divided_last": divided_last,
    "without_maximum": without_maximum,
}


def _attention(sizes: Sizes, width: int, core: Callable[[Node, Node, Node], Node]) -> openvino.Model:
    """Queries, keys and values [B, T, H*D] -> [B, T, H*D], by a core on heads [B, H, T, width]."""
    tokens, heads, narrow = sizes
    inputs = [op.parameter([BATCH, tokens, heads * narrow], np.float32, name=name) for name in "qkv"]

    def split(whole: Node) -> Node:
        apart = op.reshape(whole, _axes(BATCH, tokens, heads, narrow), False)
        if width > narrow:
            apart = op.pad(apart, _axes(0, 0, 0, 0), _axes(0, 0, 0, width - narrow), "constant", _floats(0.0))
        return op.transpose(apart, _axes(0, 2, 1, 3))

    result = op.transpose(core(*(split(whole) for whole in inputs)), _axes(0, 2, 1, 3))
    if width > narrow:
        result = op.slice(result, _axes(0), _axes(narrow), _axes(1), _axes(3))
    return openvino.Model([op.reshape(result, _axes(BATCH, tokens, heads * narrow), False)], inputs)


def _scores(sizes: Sizes, q: Node, k: Node) -> Node:
    return op.matmul(op.multiply(q, _floats(sizes.width**-0.5)), k, False, True)


def _softmax(scores: Node) -> Node:
    return op.softmax(scores, 3)


def _axes(*values: int) -> Node:
    return op.constant(np.asarray(values, np.int64))


def _floats(value: float) -> Node:
    return op.constant(np.asarray(value, np.float32))


def _compiled(model: openvino.Model, hint: str) -> openvino.InferRequest:
    properties = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    return openvino.Core().compile_model(model, "CPU", properties).create_infer_request()


if __name__ == "__main__":
    main()
