"""benchmarks/engines/attention_forms.py: its forms are one attention, and the page shows what they took."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.engines.attention_forms import BATCH, FORMS, Form, Sizes, compiled, timed_forms
from benchmarks.pages.write import page

SIZES = Sizes(tokens=8, heads=2, width=3)
ATTENTION, OTHER = FORMS[:-1], FORMS[-1]


def expected(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    def heads(flat: np.ndarray) -> np.ndarray:
        return flat.reshape(BATCH, SIZES.tokens, SIZES.heads, SIZES.width).transpose(0, 2, 1, 3)

    powers = np.exp(heads(queries) @ heads(keys).swapaxes(2, 3) / np.sqrt(SIZES.width))
    found = powers / powers.sum(axis=3, keepdims=True) @ heads(values)
    return found.transpose(0, 2, 1, 3).reshape(queries.shape)


@pytest.mark.parametrize("form", ATTENTION, ids=lambda form: form.about)
def test_every_form_is_the_same_attention(form: Form) -> None:
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((BATCH, SIZES.tokens, 6)).astype(np.float32) for _ in range(3)]
    found = compiled(form, SIZES, "f32").infer(inputs)[0]
    np.testing.assert_allclose(found, expected(*inputs), rtol=1e-4, atol=1e-5)


def test_the_page_shows_every_form() -> None:
    run = timed_forms(SIZES, rounds=2)
    machine = {"processor": "A processor", "cores": 2, "versions": {"openvino": "2026.4.1"}}
    found = {"machine": machine, "precision": "bf16", "batch": BATCH, "runs": [run]}
    text = page("measured/full-size.md", {"attention_forms": found})
    assert all(f"| {form.about} |" in text for form in FORMS)
    assert "8 tokens" in text
