"""The LoRAs of an engine: whose ranks are whose, what gives way to what, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from s2p_deploy.engines.lora_bank import BranchMatrices, LoraBank
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families.lora import Lora
from s2p_deploy.records.optional_inputs import LORA_DOWN, LORA_UP, LoraSlot, LoraSlots
from s2p_deploy.records.typed_json import json_data, read_value

RANK = 6
# two linear layers [4 -> 3] and [4 -> 2] side by side, and a convolution [2 -> 5] of 3x3
PAIR = (LoraSlot("q", "linear", (4,), 3, 0, 2, 0), LoraSlot("k", "linear", (4,), 2, RANK, 2, 3 * RANK))
CONV = LoraSlot("c", "conv", (2, 3, 3), 5, 2 * 4 * RANK, 1, 5 * RANK)
SLOTS = LoraSlots(RANK, (*PAIR, CONV))
SIZES = {LORA_DOWN: 2 * 4 * RANK + RANK * 18, LORA_UP: 5 * RANK + 5 * RANK}


def bank(dtype: str = "float32") -> tuple[LoraBank, dict[str, np.ndarray], list[str]]:
    bound: dict[str, np.ndarray] = {}
    calls: list[str] = []

    def rebind(name: str, value: np.ndarray) -> None:
        bound[name] = value.copy()
        calls.append(name)

    return LoraBank(SLOTS, dtype, SIZES, rebind), bound, calls


def matrices(rank: int, value: float = 1.0, layers: str = "qkc") -> BranchMatrices:
    shapes: dict[str, tuple[int, ...]] = {"q": (4,), "k": (4,), "c": (2, 3, 3)}
    outputs = {"q": 3, "k": 2, "c": 5}
    down = {name: np.full((rank, *shapes[name]), value, np.float32) for name in layers}
    return BranchMatrices(rank, down, {name: np.full((outputs[name], rank), value, np.float32) for name in layers})


def test_as_many_layers_may_read_one_tensor_as_read_sdxl_s_text() -> None:
    """70 keys and as many values, whose down matrices lie side by side."""
    slots = LoraSlots(2, tuple(LoraSlot(f"to_k.{i}", "linear", (4,), 3, 2 * i, 140, 6 * i) for i in range(140)))
    assert read_value(LoraSlots, json_data(slots), Path("graph.json")) == slots


def change(bound: dict[str, np.ndarray], slot: LoraSlot, strengths: np.ndarray) -> np.ndarray:
    """Computes a slot's product [outputs, inputs] as the graph does."""
    down, up = bound[LORA_DOWN], bound[LORA_UP]
    if slot.op == "conv":
        a = down[slot.down : slot.down + RANK * 18].reshape(RANK, 18)
        b = up[slot.up : slot.up + 5 * RANK].reshape(5, RANK)
        return np.asarray(b @ (strengths[:, None] * a))
    whole = down[: 4 * 2 * RANK].reshape(4, 2 * RANK)[:, slot.down : slot.down + RANK]
    b = up[slot.up : slot.up + slot.outputs * RANK].reshape(RANK, slot.outputs)
    return np.asarray(((whole * strengths) @ b).T)


def test_a_sample_has_the_sum_of_its_loras() -> None:
    made, bound, _ = bank()
    random = np.random.default_rng(0)
    own = matrices(2)
    for side in (own.down, own.up):
        for values in side.values():
            values[:] = random.standard_normal(values.shape)
    made.add("a", own)
    made.add("b", matrices(3, 0.5, "k"))
    rows = made.strengths([{"a": 2.0}, {}, {"a": 1.0, "b": -1.0}])
    for slot in SLOTS.layers:
        product = own.up[slot.layer] @ own.down[slot.layer].reshape(2, -1)
        np.testing.assert_allclose(change(bound, slot, rows[0]), 2 * product, atol=1e-6)
        assert not change(bound, slot, rows[1]).any()
        second = -3 * 0.25 if slot.layer == "k" else 0
        np.testing.assert_allclose(change(bound, slot, rows[2]), product + second, atol=1e-6)


def test_what_is_there_is_not_written_again() -> None:
    made, _, calls = bank()
    made.add("a", matrices(2))
    assert not calls
    made.strengths([{"a": 1.0}])
    made.strengths([{"a": 0.3}, {"a": 0.0}])
    assert calls == [LORA_DOWN, LORA_UP]


def test_the_one_used_longest_ago_gives_way_unless_it_is_held() -> None:
    made, bound, _ = bank()
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        made.add(name, matrices(3, value))
    made.strengths([{"a": 1.0}])
    made.strengths([{"b": 1.0}])
    made.hold(["a"])
    rows = made.strengths([{"c": 1.0}, {"a": 1.0}])
    np.testing.assert_allclose(change(bound, PAIR[0], rows[0]), 27.0)
    np.testing.assert_allclose(change(bound, PAIR[0], rows[1]), 3.0)
    made.hold(["c"])
    with pytest.raises(InputError, match=r"LoRAs a, b, c have 9 ranks together, this engine takes 6"):
        made.strengths([{"b": 1.0}])
    made.release(["a"])
    rows = made.strengths([{"b": 1.0}])
    np.testing.assert_allclose(change(bound, PAIR[0], rows[0]), 12.0)


def test_a_name_can_be_replaced_and_removed() -> None:
    made, bound, _ = bank()
    made.add("a", matrices(2))
    made.strengths([{"a": 1.0}])
    made.add("a", matrices(1, 3.0))
    np.testing.assert_allclose(change(bound, PAIR[0], made.strengths([{"a": 1.0}])[0]), 9.0)
    made.remove("a")
    made.remove("a")
    with pytest.raises(InputError, match="there is no LoRA 'a': those of this engine are none"):
        made.strengths([{"a": 1.0}])


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_must_be_finite(strength: float) -> None:
    made, *_ = bank()
    made.add("a", matrices(2))
    with pytest.raises(InputError, match="must be a finite number"):
        made.strengths([{"a": strength}])


def test_numbers_beyond_half_precision_are_refused() -> None:
    made, *_ = bank("float16")
    with pytest.raises(InputError, match="LoRA 'a' has numbers beyond float16"):
        made.add("a", matrices(2, 1e5))
    assert made.names == ()


@pytest.mark.parametrize(("dtype", "strength"), [("float16", 1e6), ("float16", -7e4), ("float32", 1e39)])
def test_a_strength_beyond_the_engines_type_is_refused(dtype: str, strength: float) -> None:
    made, *_ = bank(dtype)
    made.add("a", matrices(2))
    with pytest.raises(InputError, match=f"of LoRA 'a' must be a finite number of {dtype}"):
        made.strengths([{"a": strength}])
    assert np.isfinite(made.strengths([{"a": strength / 20}])).all()


def test_what_is_to_be_forgotten_goes_with_the_next_call() -> None:
    made, *_ = bank()
    for name in "ab":
        made.add(name, matrices(RANK))
    made.strengths([{"a": 1.0}])
    made.hold(["b"])
    made.forget(["a", "unknown"])
    with pytest.raises(InputError, match="there is no LoRA 'a': those of this engine are b"):
        made.strengths([{"a": 1.0}])
    made.strengths([{"b": 1.0}])
    assert made.names == ("b",)


def test_branches_outside_their_inputs_are_damage() -> None:
    outside = LoraSlots(RANK, (LoraSlot("q", "linear", (4,), 3, 0, 2, 2**40),))
    with pytest.raises(IntegrityError, match="leave their inputs"):
        LoraBank(outside, "float32", SIZES, lambda _name, _value: None)


def lora(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Lora:
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.{name}": tensor for name, tensor in tensors.items()}, file)
    return Lora(file, {"unet": {"q": (3, 4), "k": (2, 4), "c": (5, 2, 3, 3), "other": (3, 4)}})


def test_matrices_are_those_of_the_file_times_its_scale(tmp_path: Path) -> None:
    down, up = torch.randn(2, 4), torch.randn(3, 2)
    read = BranchMatrices.of(
        lora(tmp_path, {"q.lora_A.weight": down, "q.lora_B.weight": up, "q.alpha": torch.tensor(1.0)}), "unet", SLOTS
    )
    np.testing.assert_array_equal(read.down["q"], down.numpy())
    np.testing.assert_allclose(read.up["q"], 0.5 * up.numpy())
    assert read.rank == 2
    assert read.bytes == 4 * (8 + 6)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"other.lora_A.weight": (2, 4), "other.lora_B.weight": (3, 2)}, "changes other, where this engine has no br"),
        ({"q.lora_A.weight": (7, 4), "q.lora_B.weight": (3, 7)}, "has rank 7, this engine takes 6: export with"),
        (
            {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (3, 2), "q.lora_magnitude_vector": (3,)},
            "is a DoRA: it scales the whole weight of q",
        ),
    ],
)
def test_what_no_branch_computes_is_refused(tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    made = lora(tmp_path, {name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(InputError, match=words):
        BranchMatrices.of(made, "unet", SLOTS)
