"""LoRAs in stock pipelines with an engine: loaded, weighed and unloaded as diffusers does it in its own network."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import open_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine
from tests.random_loras import in_kohya, in_old_diffusers, in_peft, random_layers, write_lora

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.pipeline import EnginePipeline
    from tests.shared_folder import SharedFolder

    Change = Callable[[BasePipeline], dict[str, torch.Tensor]]

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
TOLERANCE = 2e-5  # of values of unit size


@pytest.fixture(scope="module")
def engine_with_branches(origin: BasePipeline, shared: SharedFolder) -> Engine:
    def make(folder: Path) -> None:
        model = calibrate(origin, Recipe.load("fp"), None, folder / "calib")
        graph = export_graph(model, folder / "graph", lora=LoraRequest(12))
        build_engine(graph, folder / "engine", backend="onnxruntime")

    return Engine.open(shared.made("small-engine-with-branches", make) / "engine")


@pytest.fixture
def opened(engine_with_branches: Engine, origin: BasePipeline) -> Iterator[EnginePipeline]:
    with open_pipeline(engine_with_branches, origin) as pipeline:
        yield pipeline


@pytest.fixture
def reference(origin: BasePipeline) -> StableDiffusionPipeline:
    return load_pipeline(origin)


@pytest.fixture(scope="module")
def files(origin: BasePipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three layouts; the second changes the text encoder too."""
    folder = tmp_path_factory.mktemp("loras")
    text = ["encoder.layers.0.self_attn.out_proj"]  # by whose name diffusers knows the layout
    first = in_peft(random_layers(origin, {"unet": ATTENTION}, seed=1))
    # of one layer each, because diffusers gives all layers of this layout the alpha of most
    second = in_kohya(random_layers(origin, {"unet": ATTENTION[:1], "text_encoder": text}, rank=2, seed=2))
    third = in_old_diffusers(random_layers(origin, {"unet": ATTENTION[2:]}, seed=3))
    return [write_lora(folder / f"{n}.safetensors", each) for n, each in enumerate((first, second, third))]


def predicted(pipe: StableDiffusionPipeline, **options: object) -> np.ndarray:
    """One call of the denoiser, at the states of a text that the pipeline's own encoder reads."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *[pipe.unet.config.in_channels, 8, 8], generator=generator)
    with torch.no_grad():
        text = pipe.encode_prompt("a red circle", torch.device("cpu"), 2, do_classifier_free_guidance=False)[0]
        output = pipe.unet(sample, torch.tensor([1, 501]), text, return_dict=False, **options)[0]
    return np.asarray(output.numpy())


def assert_alike(one: StableDiffusionPipeline, other: StableDiffusionPipeline, **options: object) -> np.ndarray:
    expected = predicted(one, **options)
    np.testing.assert_allclose(predicted(other, **options), expected, atol=TOLERANCE * np.abs(expected).max())
    return expected


def test_a_lora_has_the_life_that_it_has_in_diffusers(
    opened: EnginePipeline, reference: StableDiffusionPipeline, files: list[Path]
) -> None:
    pipes = (reference, opened.pipe)
    plain = assert_alike(*pipes)
    for pipe in pipes:
        pipe.load_lora_weights(str(files[0]), adapter_name="a")
    acting = assert_alike(*pipes)
    assert np.abs(acting - plain).max() > 0.05
    halved = assert_alike(*pipes, cross_attention_kwargs={"scale": 0.5})
    assert np.abs(halved - acting).max() > 0.01
    for pipe in pipes:
        pipe.load_lora_weights(str(files[1]), adapter_name="b")  # alone acts now
    assert_alike(*pipes)
    assert reference.unet.active_adapters() == opened.pipe.unet.active_adapters() == ["b"]
    for pipe in pipes:
        pipe.load_lora_weights(str(files[2]), adapter_name="c")
        pipe.set_adapters(["a", "c"], [0.7, -0.4])
    assert_alike(*pipes)
    assert reference.get_list_adapters() == opened.pipe.get_list_adapters()
    for pipe in pipes:
        pipe.disable_lora()
    assert_alike(*pipes)
    for pipe in pipes:
        pipe.enable_lora()
        pipe.delete_adapters("a")
    assert_alike(*pipes)
    opened.pipe.unload_lora_weights()
    np.testing.assert_allclose(predicted(opened.pipe), plain, atol=TOLERANCE * np.abs(plain).max())


def test_without_a_lora_the_bits_are_those_of_an_engine_without_branches(
    opened: EnginePipeline, origin: BasePipeline, files: list[Path], tmp_path: Path
) -> None:
    model = calibrate(origin, Recipe.load("fp"), None, tmp_path / "calib")
    build_engine(export_graph(model, tmp_path / "graph"), tmp_path / "engine", backend="onnxruntime")
    with open_pipeline(Engine.open(tmp_path / "engine"), origin) as plain:
        expected = predicted(plain.pipe)
    np.testing.assert_array_equal(predicted(opened.pipe), expected)
    opened.pipe.load_lora_weights(str(files[0]))
    assert (predicted(opened.pipe) != expected).any()
    opened.pipe.unload_lora_weights()
    np.testing.assert_array_equal(predicted(opened.pipe), expected)


def test_each_sample_of_a_batch_has_its_own(opened: EnginePipeline, files: list[Path]) -> None:
    for name, file in zip("ab", (files[0], files[2]), strict=True):
        opened.pipe.load_lora_weights(str(file), adapter_name=name)
    rows = [{"a": 1.0}, {"a": 0.5, "b": -1.0}]
    mixed = predicted(opened.pipe, cross_attention_kwargs={"loras": rows})
    for number, row in enumerate(rows):
        alone = predicted(opened.pipe, cross_attention_kwargs={"loras": row})
        np.testing.assert_array_equal(mixed[number], alone[number])


def test_a_copy_of_the_component_weighs_apart(opened: EnginePipeline, files: list[Path]) -> None:
    opened.pipe.load_lora_weights(str(files[0]), adapter_name="a")
    copied = copy.deepcopy(opened.pipe.unet)
    copied.set_adapters("a", 0.25)
    assert opened.pipe.unet.loras.active == {"a": 1.0}
    acting = predicted(opened.pipe)
    copied.unload_lora()
    np.testing.assert_array_equal(predicted(opened.pipe), acting)


def test_a_lora_can_take_the_place_of_another(opened: EnginePipeline, files: list[Path]) -> None:
    pipe = opened.pipe
    pipe.load_lora_weights(str(files[2]), adapter_name="a")
    expected = predicted(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(files[0]), adapter_name="a")
    pipe.unet.load_lora_adapter(pipe.lora_state_dict(str(files[2]))[0], prefix="unet", adapter_name="a", hotswap=True)
    np.testing.assert_array_equal(predicted(pipe), expected)


def tensors_of(origin: BasePipeline, *, rank: int = 4, dora: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    return in_peft(random_layers(origin, {"unet": ATTENTION[:1]}, rank=rank, dora=dora, seed=seed))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda base: tensors_of(base, rank=13), "has rank 13, this engine takes 12"),
        (lambda base: tensors_of(base, dora=True), "is a DoRA"),
        (lambda base: {n: t * float("nan") for n, t in tensors_of(base).items()}, "NaN or infinity"),
        (lambda base: {n: t[:, :3] if "lora_A" in n else t for n, t in tensors_of(base).items()}, "another model"),
        (
            lambda base: in_peft(random_layers(base, {"unet": [f"{BLOCK}.ff.net.2"]})),
            "ff.net.2, where this engine has no branch: export with --lora-for",
        ),
        (lambda base: {n.replace("blocks.0", "blocks.9"): t for n, t in tensors_of(base).items()}, "no layer of it"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    opened: EnginePipeline, origin: BasePipeline, change: Change, words: str, tmp_path: Path
) -> None:
    file = write_lora(tmp_path / "odd.safetensors", change(origin))
    with pytest.raises(InputError, match=words) as refused:
        opened.pipe.load_lora_weights(str(file), adapter_name="odd")
    assert "\n" not in str(refused.value)
    assert opened.pipe.unet.loras.loaded == {}


def test_ranks_that_do_not_fit_together_are_refused(
    opened: EnginePipeline, origin: BasePipeline, tmp_path: Path
) -> None:
    for number in range(2):
        file = write_lora(tmp_path / f"{number}.safetensors", tensors_of(origin, rank=8, seed=number))
        opened.pipe.load_lora_weights(str(file), adapter_name=str(number))
    predicted(opened.pipe)  # one after the other they fit
    opened.pipe.set_adapters(["0", "1"])
    with pytest.raises(InputError, match="have 16 ranks together, this engine takes 12"):
        predicted(opened.pipe)
    opened.pipe.set_adapters("0")
    predicted(opened.pipe)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda unet: unet.load_lora_adapter("somewhere"), "load it with the pipeline's load_lora_weights"),
        (lambda unet: unet.loras.strengths({"loras": [{}] * 3}, 2), "3 settings of LoRAs, scaled by 1.0, do not fit"),
        (lambda unet: unet.loras.strengths({"scale": "much"}, 2), "scaled by 'much', do not fit a batch of 2"),
        (lambda unet: unet.loras.strengths({"loras": []}, 2), "0 settings of LoRAs"),
        (lambda unet: unet.loras.strengths({"loras": {"a": 1.0}}, 2), "there is no LoRA 'a': load it first"),
    ],
)
def test_calls_that_mean_nothing_are_refused(
    opened: EnginePipeline, ask: Callable[[object], object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        ask(opened.pipe.unet)


def test_a_name_is_taken_once(opened: EnginePipeline, files: list[Path]) -> None:
    opened.pipe.load_lora_weights(str(files[0]), adapter_name="a")
    with pytest.raises(InputError, match="LoRA 'a' cannot be loaded, that name is taken"):
        opened.pipe.load_lora_weights(str(files[2]), adapter_name="a")


def test_weights_per_block_are_refused(opened: EnginePipeline, files: list[Path]) -> None:
    opened.pipe.load_lora_weights(str(files[0]), adapter_name="a")
    with pytest.raises(InputError, match="one finite weight for all its layers"):
        opened.pipe.unet.set_adapters("a", {"down": 0.5})
    with pytest.raises(InputError, match="there is no LoRA 'b'"):
        opened.pipe.unet.set_adapters("b")


def test_an_engine_without_branches_says_what_to_do(engine: Engine, origin: BasePipeline, files: list[Path]) -> None:
    with open_pipeline(engine, origin) as plain, pytest.raises(InputError, match="export with --lora-rank, or fuse"):
        plain.pipe.load_lora_weights(str(files[0]))
