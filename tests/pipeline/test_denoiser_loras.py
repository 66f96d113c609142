"""LoRAs in stock pipelines with an engine: loaded, weighed and unloaded as diffusers does it in its own network."""

from __future__ import annotations

import copy
import gc
import logging
from typing import TYPE_CHECKING, Any

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
from tests.small_pipelines import shared_small_components

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
        assert pipe.get_active_adapters() == ["a", "c"]
    assert_alike(*pipes)
    for pipe in pipes:
        pipe.enable_lora()
        pipe.delete_adapters("a")
    assert_alike(*pipes)
    opened.pipe.unload_lora_weights()
    np.testing.assert_allclose(predicted(opened.pipe), plain, atol=TOLERANCE * np.abs(plain).max())


@pytest.mark.parametrize("text_engine", [False, True])
def test_pipelines_say_which_loras_act(
    engine_with_branches: Engine,
    origin: BasePipeline,
    reference: StableDiffusionPipeline,
    shared: SharedFolder,
    files: list[Path],
    *,
    text_engine: bool,
) -> None:
    parts = shared_small_components(shared, "onnxruntime") if text_engine else None
    with open_pipeline(engine_with_branches, origin, components=parts) as opened:
        pipes = (reference, opened.pipe)

        def alike(change: Callable[[StableDiffusionPipeline], object], active: list[str]) -> None:
            for pipe in pipes:
                change(pipe)
                assert pipe.get_active_adapters() == active
            assert reference.get_list_adapters() == opened.pipe.get_list_adapters()
            assert_alike(*pipes)

        alike(lambda pipe: pipe.load_lora_weights(str(files[0]), adapter_name="a"), ["a"])
        alike(lambda pipe: pipe.set_adapters("a", adapter_weights=[{"unet": 0.5}]), ["a"])
        alike(lambda pipe: pipe.load_lora_weights(str(files[2]), adapter_name="c"), ["c"])
        alike(lambda pipe: pipe.delete_adapters(["c", "unknown"]), ["a"])  # with the weight that it had
        alike(lambda pipe: pipe.unfuse_lora(), ["a"])
        alike(lambda pipe: pipe.set_lora_device(["a"], "cpu"), ["a"])
        with pytest.raises(ValueError, match="Adapter name"):
            opened.pipe.set_adapters("unknown")
        with pytest.raises(InputError, match="one that is loaded acts unfused"):
            opened.pipe.fuse_lora()
        alike(lambda pipe: (pipe.disable_lora(), pipe.set_adapters("a"), pipe.enable_lora()), ["a"])
        alike(lambda pipe: pipe.unload_lora_weights(), [])


def test_a_lora_of_the_text_encoder_alone_acts_beside_others(
    opened: EnginePipeline, reference: StableDiffusionPipeline, origin: BasePipeline, files: list[Path], tmp_path: Path
) -> None:
    layers = random_layers(origin, {"text_encoder": ["encoder.layers.0.self_attn.out_proj"]}, seed=4)
    text = write_lora(tmp_path / "text.safetensors", in_peft(layers))
    for pipe in (reference, opened.pipe):
        pipe.load_lora_weights(str(files[0]), adapter_name="a")
        pipe.load_lora_weights(str(text), adapter_name="t")
        pipe.set_adapters(["a", "t"], [0.5, 0.25])
        assert pipe.get_active_adapters() == ["a", "t"]
    assert_alike(reference, opened.pipe)


def test_a_lora_for_a_text_encoder_on_an_engine_is_refused_whole(
    engine_with_branches: Engine, origin: BasePipeline, shared: SharedFolder, files: list[Path]
) -> None:
    parts = shared_small_components(shared, "onnxruntime")
    with open_pipeline(engine_with_branches, origin, components=parts) as opened:
        with pytest.raises(InputError, match="LoRA 'b' changes the text_encoder, which runs on an engine here"):
            opened.pipe.load_lora_weights(str(files[1]), adapter_name="b")
        assert opened.pipe.get_list_adapters() == {}


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


def asking(**attention: object) -> Callable[[Any], object]:
    return lambda unet: unet.loras.strengths(attention, torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda unet: unet.load_lora_adapter("somewhere"), "load it with the pipeline's load_lora_weights"),
        (asking(scale="much"), "the scale of LoRAs on an engine is one finite number for all layers, not 'much'"),
        (asking(scale=True), "not True"),
        (asking(scale=10**400), "not 10"),
        (asking(loras=[]), "loras in cross_attention_kwargs is \\[\\]: give weights by name in a dict"),
        (asking(loras=None), "is None: give weights by name in a dict"),
        (asking(loras=5), "is 5: give weights by name in a dict"),
        (asking(loras=[["x"]]), "give weights by name in a dict"),
        (asking(loras=[{}, "x"]), "give weights by name in a dict"),
        (asking(loras={"b": 1.0}), "there is no LoRA 'b': load it first"),
        (asking(loras={"x": "a"}), "a LoRA's weight on an engine is one finite number for all layers, not 'a'"),
        (asking(loras={"x": None}), "not None"),
        (asking(loras=[{"x": 1.0}, {"x": float("nan")}]), "not nan"),
        (lambda unet: unet.set_adapters("x", True), "not True"),
        (lambda unet: unet.set_adapters("x", [10**400]), "not 10"),
        (lambda unet: unet.set_adapters("x", {"down": 0.5}), "not {'down': 0.5}"),
        (lambda unet: unet.set_adapters("x", [1.0, 2.0]), "1 LoRAs and 2 weights: give one weight for each"),
    ],
)
def test_calls_that_mean_nothing_are_refused(
    opened: EnginePipeline, files: list[Path], ask: Callable[[object], object], words: str
) -> None:
    opened.pipe.load_lora_weights(str(files[0]), adapter_name="x")
    with pytest.raises(InputError, match=words) as refused:
        ask(opened.pipe.unet)
    assert "\n" not in str(refused.value)
    assert opened.pipe.unet.loras.active == {"x": 1.0}


def latents(samples: int, *, guided: bool) -> torch.Tensor:
    noise = torch.randn(samples // 2 if guided else samples, 4, 8, 8)
    return torch.cat([noise] * 2) if guided else noise


@pytest.mark.parametrize(
    ("sample", "rows", "pictures"),
    [
        (latents(8, guided=True), 2, 4),  # two prompts of two pictures
        (latents(4, guided=False), 2, 4),
        (latents(4, guided=True), 3, 2),
        (latents(3, guided=False), 2, 3),
        (latents(2, guided=True), 4, 1),
    ],
)
def test_settings_of_other_than_all_pictures_are_refused(
    opened: EnginePipeline, sample: torch.Tensor, rows: int, pictures: int
) -> None:
    words = f"{rows} settings of LoRAs for a call of {pictures} pictures: give one for all, or {pictures}"
    with pytest.raises(InputError, match=words):
        opened.pipe.unet.loras.strengths({"loras": [{}] * rows}, sample)


@pytest.mark.parametrize(
    ("sample", "rows", "order"),
    [
        (latents(4, guided=True), 2, [0, 1, 0, 1]),
        (latents(4, guided=True).fill_(torch.nan), 2, [0, 1, 0, 1]),
        (latents(4, guided=True), 4, [0, 1, 2, 3]),
        (latents(4, guided=True).half(), 1, [0, 0, 0, 0]),
        (latents(3, guided=False), 3, [0, 1, 2]),
    ],
)
def test_samples_have_the_settings_of_their_pictures(
    opened: EnginePipeline, files: list[Path], sample: torch.Tensor, rows: int, order: list[int]
) -> None:
    opened.pipe.load_lora_weights(str(files[0]), adapter_name="a")
    given = [{"a": 1.0 + number} for number in range(rows)]
    strengths = opened.pipe.unet.loras.strengths({"loras": given}, sample)
    assert strengths.max(1).tolist() == [1.0 + number for number in order]


def test_guided_pictures_have_the_loras_that_they_have_alone(opened: EnginePipeline, files: list[Path]) -> None:
    pipe, prompts = opened.pipe, ["a red circle", "a blue square"]
    pipe.load_lora_weights(str(files[0]), adapter_name="a")
    noise = latents(4, guided=False)

    def drawn(texts: list[str], noise: torch.Tensor, rows: object, guidance_scale: float, count: int = 1) -> np.ndarray:
        attention = {"num_images_per_prompt": count, "cross_attention_kwargs": {"loras": rows}}
        options = {"num_inference_steps": 2, "guidance_scale": guidance_scale, "output_type": "latent"}
        return np.asarray(pipe(texts, latents=noise, **options, **attention).images.numpy())

    rows = [{"a": 1.0}, {"a": -1.0}]
    both = drawn(prompts, noise[:2], rows, 3.0)
    for number, row in enumerate(rows):
        alone = drawn(prompts[number : number + 1], noise[number : number + 1], row, 3.0)
        np.testing.assert_allclose(both[number], alone[0], atol=1e-4)
    for guidance in (1.0, 3.0):
        with pytest.raises(InputError, match="2 settings of LoRAs for a call of 4 pictures"):
            drawn(prompts, noise, rows, guidance, 2)


def test_copies_free_their_loras_when_they_go(opened: EnginePipeline, files: list[Path]) -> None:
    unet = opened.pipe.unet
    opened.pipe.load_lora_weights(str(files[0]), adapter_name="x")
    copies = [copy.deepcopy(unet) for _ in range(3)]
    copies[0].load_lora_adapter(opened.pipe.lora_state_dict(str(files[2]))[0], adapter_name="later")
    assert len(unet.loras.bank.names) == 5
    del copies
    gc.collect()
    assert unet.loras.bank.names == (unet.loras.loaded["x"],)
    unet.loras.delete(["x"])
    assert unet.loras.bank.names == ()


@pytest.mark.parametrize("other", ["text_encoder.encoder.layers.0.self_attn.q_proj", "transformer.single_blocks.0.q"])
def test_a_lora_without_a_tensor_for_the_denoiser_is_told(
    opened: EnginePipeline, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    tensors = {f"{other}.lora_A.weight": torch.ones(2, 4), f"{other}.lora_B.weight": torch.ones(4, 2)}
    with caplog.at_level(logging.WARNING, "s2p_deploy"):
        opened.pipe.unet.load_lora_adapter(tensors, adapter_name="flux")
    (record,) = [record for record in caplog.records if record.name == "s2p_deploy.pipeline"]
    assert (
        f"nothing in LoRA 'flux' is for this denoiser, whose names begin with 'unet.' (its first tensor is {other}"
        in (record.getMessage())
    )
    assert opened.pipe.unet.loras.loaded == {}


def test_a_name_is_taken_once(opened: EnginePipeline, files: list[Path]) -> None:
    opened.pipe.load_lora_weights(str(files[0]), adapter_name="a")
    with pytest.raises(InputError, match="LoRA 'a' cannot be loaded, that name is taken"):
        opened.pipe.load_lora_weights(str(files[2]), adapter_name="a")


def test_an_engine_without_branches_says_what_to_do(engine: Engine, origin: BasePipeline, files: list[Path]) -> None:
    with open_pipeline(engine, origin) as plain, pytest.raises(InputError, match="export with --lora-rank, or fuse"):
        plain.pipe.load_lora_weights(str(files[0]))
