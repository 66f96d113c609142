"""Attention as export writes it, small."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.graph_text import graph_from_text

ASKED, HEADS, WIDTH = 5, 2, 3
# 2 heads of 3, 5 tokens that ask; both operands carry the root of the scale.
GRAPH = """
g (
    float[batch,5,6] q, float[batch,tokens,6] k, float[batch,tokens,6] v,
    int64[4] asked, int64[4] answered, int64[3] flat, float root
) => (float[batch,5,6] y) {
    q4 = Reshape(q, asked)
    k4 = Reshape(k, answered)
    v4 = Reshape(v, answered)
    qh = Transpose <perm: ints = [0, 2, 1, 3]> (q4)
    kh = Transpose <perm: ints = [0, 2, 1, 3]> (k4)
    vh = Transpose <perm: ints = [0, 2, 1, 3]> (v4)
    kt = Transpose <perm: ints = [0, 1, 3, 2]> (kh)
    qs = Mul(qh, root)
    ks = Mul(kt, root)
    scores = MatMul(qs, ks)
    shares = Softmax <axis: int = -1> (scores)
    mixed = MatMul(shares, vh)
    turned = Transpose <perm: ints = [0, 2, 1, 3]> (mixed)
    y = Reshape(turned, flat)
}
"""


def attention(answered: int = 4, **changes: tuple[str, str]) -> ir.Model:
    """With so many tokens that answer; each change replaces a piece of the text."""
    text = GRAPH.replace("tokens", str(answered))
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    stored = {
        "asked": np.asarray([-1, ASKED, HEADS, WIDTH]),
        "answered": np.asarray([-1, answered, HEADS, WIDTH]),
        "flat": np.asarray([-1, ASKED, HEADS * WIDTH]),
        "root": np.asarray(np.float32(0.7)),
    }
    return graph_from_text(text, stored)


def inputs(answered: int = 4) -> dict[str, np.ndarray]:
    """Standard normal values for two samples."""
    random = np.random.default_rng(0)
    tokens = {"q": ASKED, "k": answered, "v": answered}
    return {name: random.standard_normal((2, count, 6)).astype(np.float32) for name, count in tokens.items()}
