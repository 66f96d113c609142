"""LoRA files: names of every layout, scales, the arithmetic by hand, and what is refused."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from s2p_deploy.errors import InputError
from s2p_deploy.families.lora import GivenLora, Lora, LoraInMemory, LowRank, fused_weight

TO_Q, TO_OUT = (
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
)
CONV, TIME = "down_blocks.0.resnets.0.conv1", "time_embedding.linear_1"
PROJ, FC = "encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc1"
WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {TO_Q: (6, 6), TO_OUT: (6, 6), CONV: (4, 3, 3, 3), TIME: (8, 4), "conv_in": (4, 3, 3, 3)},
    "text_encoder": {PROJ: (6, 6), FC: (8, 6)},
    "text_encoder_2": {f"text_model.{PROJ}": (6, 6)},
}
NAMES = {
    # PEFT's, by diffusers and by itself
    f"unet.{TO_Q}.lora_A.weight": ("unet", TO_Q),
    f"unet.{TO_Q}.lora_A.default.weight": ("unet", TO_Q),
    f"base_model.model.{TO_Q}.lora_A.weight": ("unet", TO_Q),
    f"text_encoder.text_model.{PROJ}.lora_A.weight": ("text_encoder", PROJ),
    f"text_encoder.{PROJ}.lora_A.weight": ("text_encoder", PROJ),
    f"text_encoder_2.{PROJ}.lora_A.weight": ("text_encoder_2", f"text_model.{PROJ}"),
    # kohya's, over the names of diffusers and of Stability's code
    "lora_unet_" + TO_OUT.replace(".", "_") + ".lora_down.weight": ("unet", TO_OUT),
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": ("unet", CONV),
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight": ("unet", TO_Q),
    "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": ("unet", CONV),
    "lora_unet_time_embed_0.lora_down.weight": ("unet", TIME),
    "lora_unet_input_blocks_0_0.lora_down.weight": ("unet", "conv_in"),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ("text_encoder", FC),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ("text_encoder", FC),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": ("text_encoder_2", f"text_model.{PROJ}"),
    "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_down.weight": ("unet", TO_Q),
    # the two older ones of diffusers
    f"unet.{TO_Q}.lora.down.weight": ("unet", TO_Q),
    f"unet.{TO_Q.replace('attn1.', 'attn1.processor.')}_lora.down.weight": ("unet", TO_Q),
    "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight": ("unet", TO_OUT),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": ("text_encoder", PROJ),
    f"text_encoder.text_model.{FC}.lora_linear_layer.down.weight": ("text_encoder", FC),
}


def up_of(name: str) -> str:
    return name.replace("lora_A", "lora_B").replace("down.weight", "up.weight")


def matrices(shape: tuple[int, ...], rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    down = torch.ones(rank, *shape[1:])
    return down, torch.ones(shape[0], rank, *[1] * (len(shape) - 2))


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "ink.safetensors", **metadata: str) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata or None)
    return folder / name


def one_layer(
    name: str = f"unet.{TO_Q}.lora_A.weight", shape: tuple[int, ...] = (6, 6), rank: int = 2
) -> dict[str, Any]:
    down, up = matrices(shape, rank)
    return {name: down, up_of(name): up}


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_found_by_the_name_of_every_layout(tmp_path: Path, name: str) -> None:
    component, path = NAMES[name]
    lora = Lora(write(tmp_path, one_layer(name, WEIGHTS[component][path])), WEIGHTS)
    [layer] = lora.layers
    assert (layer.component, layer.path, layer.rank, layer.scale) == (component, path, 2, 1.0)
    assert lora.read(layer).difference().shape == WEIGHTS[component][path]


def test_an_alpha_of_its_own_scales_a_layer(tmp_path: Path) -> None:
    prefix = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = one_layer(f"{prefix}.lora_down.weight", (8, 6), rank=4) | {f"{prefix}.alpha": torch.tensor(1.0)}
    [layer] = Lora(write(tmp_path, tensors), WEIGHTS).layers
    assert layer.scale == 0.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_matrices_of_every_type_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(each.shape, generator=generator).to(dtype) for name, each in one_layer().items()}
    lora = Lora(write(tmp_path, tensors), WEIGHTS)
    change = lora.read(lora.layers[0])
    down, up = tensors.values()
    torch.testing.assert_close((change.down, change.up), (down.float(), up.float()), rtol=0, atol=0)


@pytest.mark.parametrize("path", [TO_Q, TO_OUT, CONV])
def test_an_alpha_that_diffusers_renamed_scales_a_layer(tmp_path: Path, path: str) -> None:
    """Of attention layers it gives the alpha the name of the matrix, with ``.alpha`` behind it."""
    prefix = f"lora_unet_{path.replace('.', '_')}"
    tensors = one_layer(f"{prefix}.lora_down.weight", WEIGHTS["unet"][path]) | {f"{prefix}.alpha": torch.tensor(1.0)}
    converted, alphas = StableDiffusionPipeline.lora_state_dict(write(tmp_path, tensors))
    given = converted | {name: torch.tensor(alpha) for name, alpha in alphas.items()}
    [layer] = Lora("ink", WEIGHTS, LoraInMemory(given, {})).layers
    assert (layer.path, layer.scale) == (path, 0.5)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 6}, 3.0),
        ({"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / math.sqrt(2)),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 1, "attn1.to_k": 9}}, 0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"^to_q": 1, "n1.to_q": 1}}, 3.0),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {f"^{TO_Q}": 1}}, 0.5),
        ({"text_encoder.lora_alpha": 6}, 1.0),
    ],
)
def test_the_settings_in_a_header_scale_layers(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    file = write(tmp_path, one_layer(), lora_adapter_metadata=json.dumps(settings))
    assert Lora(file, WEIGHTS).layers[0].scale == pytest.approx(scale)


def test_the_settings_beside_a_file_of_peft_scale_layers_and_are_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}), encoding="utf-8")
    tensors = one_layer(f"base_model.model.{TO_Q}.lora_A.weight")
    lora = Lora(write(tmp_path, tensors, "adapter_model.safetensors"), WEIGHTS)
    assert lora.layers[0].scale == 4.0
    assert set(lora.digests()) == {"sha256", "settings"}
    assert Lora(write(tmp_path, tensors), WEIGHTS).layers[0].scale == 1.0  # another file's settings


def low_rank(magnitude: torch.Tensor | None = None) -> LowRank:
    return LowRank(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]]), 0.5, magnitude)


def test_a_weight_with_a_lora_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # 0.5 * [[1], [0]] @ [[0, 2]] = [[0, 1], [0, 0]]
    assert fused_weight(weight, [(low_rank(), 3.0)]).tolist() == [[1.0, 5.0], [3.0, 4.0]]


def test_a_weight_with_a_dora_by_hand() -> None:
    weight = torch.tensor([[3.0, 3.0], [0.0, 2.0]])
    dora = low_rank(magnitude=torch.tensor([10.0, 1.0]))
    # the sum is [[3, 4], [0, 2]], whose rows have the norms 5 and 2
    assert fused_weight(weight, [(dora, 1.0)]).tolist() == [[6.0, 8.0], [0.0, 1.0]]


def test_a_convolution_by_hand() -> None:
    down = torch.arange(9.0).view(1, 1, 3, 3)
    change = LowRank(down, torch.tensor([[2.0]]), 1.0, None)
    assert torch.equal(fused_weight(torch.ones(1, 1, 3, 3), [(change, 1.0)]), 1 + 2 * down)
    flat = LowRank(torch.ones(1, 3), torch.ones(2, 1), 1.0, None)  # of a linear layer, for a 1x1 convolution
    assert torch.equal(fused_weight(torch.zeros(2, 3, 1, 1), [(flat, 1.0)]), torch.ones(2, 3, 1, 1))


@given(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_loras_add_up_in_any_order_and_linearly(first: float, second: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, generator=generator)
    one, other = (
        LowRank(torch.randn(2, 4, generator=generator), torch.randn(5, 2, generator=generator), 1.0, None)
        for _ in range(2)
    )
    both = fused_weight(weight, [(one, first), (other, second)])
    expected = weight + first * one.difference() + second * other.difference()
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both, fused_weight(weight, [(other, second), (one, first)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [("ink.safetensors", "ink.safetensors", 1.0), ("a/b:0.5", "a/b", 0.5), ("b:-1e-1", "b", -0.1), ("a:b", "a:b", 1.0)],
)
def test_a_file_and_its_weight_are_read(text: str, file: str, weight: float) -> None:
    assert GivenLora.parse(text) == GivenLora(Path(file), weight)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "FILE"), (":0.5", "FILE"), ("a:", "FILE"), ("a:nan", "finite"), ("a:inf", "finite"), ("a:0", "0")],
)
def test_a_weight_that_is_none_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        GivenLora.parse(text)


def changed(**other: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """One layer with other tensors, their names' ``/`` for dots; None leaves one out."""
    tensors = one_layer() | {name.replace("/", "."): tensor for name, tensor in other.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


Q = f"unet.{TO_Q}"
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": ONE}, "no LoRA.*weight"),
        ({}, "no LoRA"),
        (changed(**{f"{Q}.lora_B.weight": None}), r"lora_A.weight without the up matrix"),
        (changed(**{f"{Q}.lora_A.weight": None}), r"lora_B.weight without the down matrix"),
        (changed(**{f"{Q}.lora_B.weight": torch.full((6, 2), math.nan)}), "lora_B.weight holds NaN or infinity"),
        (changed(**{f"{Q}.lora_A.weight": torch.full((2, 6), math.inf)}), "lora_A.weight holds NaN or infinity"),
        (changed(**{f"{Q}.lora_B.weight": torch.zeros(6, 2)}), "changes nothing"),
        (changed(**{f"{Q}.alpha": torch.tensor(0.0)}), "changes nothing"),
        (changed(**{f"{Q}.alpha": torch.ones(2)}), "an alpha is one number"),
        (changed(**{f"{Q}.lora_B.weight": torch.ones(6, 2, dtype=torch.float8_e4m3fn)}), "F8_E4M3"),
        (one_layer(rank=5000), "rank must be 1 to 4096"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 6), f"{Q}.lora_B.weight": torch.ones(6, 0)}, "rank must be 1 to"),
        (one_layer(shape=(6, 7)), r"another model.*\[2, 7\] and \[6, 2\].*to_q of the unet is \[6, 6\]"),
        (one_layer(shape=(7, 6)), r"another model.*\[2, 6\] and \[7, 2\].*\[6, 6\]"),
        (one_layer(f"unet.{CONV}.lora_A.weight", (4, 3, 1, 1)), r"another model.*\[4, 3, 3, 3\]"),
        (changed(**{f"{Q}.lora_magnitude_vector": torch.ones(5)}), "one magnitude for each output"),
        (changed(**{f"{Q}.dora_scale": torch.ones(1, 6)}), "one magnitude for each output"),  # they are the inputs'
        (one_layer("unet.nowhere.lora_A.weight"), "another model.*nowhere.*no layer of it"),
        (one_layer(f"transformer.{TO_Q}.lora_A.weight"), "another model.*a transformer, which it lacks"),
        (one_layer("lora_te3_x.lora_down.weight"), "another model.*a text_encoder_3, which it lacks"),
        (one_layer(f"{PROJ}.lora_A.weight"), "could belong to the text_encoder or the text_encoder_2"),
        (one_layer() | one_layer(f"unet.{TO_Q}.lora.down.weight"), "twice: by "),
        (one_layer() | one_layer(f"lora_unet_{TO_Q.replace('.', '_')}.lora_down.weight"), "twice.*two layouts"),
        (changed(**{"some.thing": ONE, "some.more": ONE}), "some.more and 1 others"),
        (changed(**{f"unet.{TO_OUT}.diff": ONE}), r"a whole difference"),
        (changed(**{f"{Q}.lora_mid.weight": ONE}), "core tensor"),
        (changed(**{f"{Q}.lora_B.bias": ONE}), "with a bias"),
        (changed(**{"bundle_emb.word.string_to_param.*": ONE}), "textual inversion"),
        ({"lora_unet_conv_in.hada_w1_a": ONE}, "a LoHa"),
        ({"lora_unet_conv_in.lokr_w1": ONE}, "a LoKr"),
        ({"lora_unet_conv_in.oft_blocks": ONE}, "an OFT"),
        ({"lora_controlnet": ONE, "input_blocks.0.0.up": ONE}, "a Control-LoRA"),
        ({"controlnet_cond_embedding.conv_in.weight": ONE}, "a ControlNet"),
        ({"adapter.body.0.resnets.0.block1.weight": ONE}, "a T2I-Adapter"),
        ({"image_proj.norm.weight": ONE}, "an IP-Adapter"),
        ({"model.diffusion_model.input_blocks.0.0.weight": ONE}, "a whole checkpoint"),
    ],
)
def test_what_is_no_lora_of_this_pipeline_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    file = write(tmp_path, tensors)
    with pytest.raises(InputError, match=words) as refused:
        Lora(file, WEIGHTS)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (one_layer("lora_te3_x.lora_down.weight"), {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0"),
        (
            one_layer("unet.up_blocks.7.attn2.to_k.lora_A.weight", (6, 2048)),
            {},
            "reads the text of SDXL",
        ),
        (one_layer("lora_unet_up_attn2_to_k.lora_down.weight", (6, 1024)), {}, "text of Stable Diffusion 2"),
    ],
)
def test_the_model_that_a_lora_is_for_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        Lora(write(tmp_path, tensors, **metadata), WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("no JSON", "no JSON"),
        ("[" * 200_000, r"no JSON \(RecursionError\)"),
        ("[]", "JSON object"),
        (f'{{"unet.lora_alpha": {10**400}}}', r"lora_alpha 10{59}: an alpha is one finite number"),
        ('{"unet.lora_alpha": Infinity}', "lora_alpha inf"),
        (json.dumps({"unet.lora_alpha": "x"}), "lora_alpha 'x'"),
        (json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 1}}), "alpha_pattern"),
        (json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}), "alpha_pattern"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path: Path, settings: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Lora(write(tmp_path, one_layer(), lora_adapter_metadata=settings), WEIGHTS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"lora_alpha": 8}'.encode("utf-16"),
            r"adapter_config.json: PEFT's settings are no JSON \(UnicodeDecodeError",
        ),
        (b"[" * 200_000, r"adapter_config.json: PEFT's settings are no JSON \(RecursionError"),
        (None, r"adapter_config.json cannot be read \(Input/output error\): get the LoRA again"),
    ],
)
def test_settings_beside_a_file_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    beside, read = tmp_path / "adapter_config.json", Path.read_bytes
    beside.write_bytes(content or b"{}")

    def failing(path: Path) -> bytes:
        if content is None and path == beside:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(InputError, match=words) as refused:
        Lora(write(tmp_path, one_layer(), "adapter_model.safetensors"), WEIGHTS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ink.safetensors", None, "does not exist"),
        ("ink.safetensors", b"", "damaged or not whole"),
        ("ink.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        ("ink.safetensors", b"PK\x03\x04 and more", "pickled"),
        ("ink.safetensors", b"\x80\x02}q\x00.", "pickled"),
        ("ink.pt", b"anything", "pickled"),
        ("ink.bin", b"anything", "pickled"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        Lora(tmp_path / name, WEIGHTS)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, share: float) -> None:
    file = write(tmp_path, one_layer())
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="damaged or not whole"):
        Lora(file, WEIGHTS)
