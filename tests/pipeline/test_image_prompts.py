"""IP-Adapters on an engine, through the calls that users make on stock pipelines: what diffusers' own network draws."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine, load_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import ImagePrompt, IpAdapter, Schedule, generate, initial_noise, pipeline_with_engine
from s2p_deploy.pipeline.image_prompts import packed
from s2p_deploy.pipeline.ip_adapter import prompted
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, Prompt
from s2p_deploy.records.optional_inputs import ImageSlot, ImageSlots
from tests.random_ip_adapters import image_embeds, random_ip_adapter, write_ip_adapter
from tests.small_controlnets import control_picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    from s2p_deploy.families import BasePipeline
    from tests.shared_folder import SharedFolder

PROMPT = "a small red circle at the top left, white background"
CLOSE = 1e-4


@pytest.fixture(scope="module")
def taking(origin: BasePipeline, shared: SharedFolder) -> Engine:
    """In floating point, with 9 tokens for each of two adapters: not a multiple of what they make."""

    def make(folder: Path) -> None:
        model = calibrate(origin, Recipe.load("fp"), None, folder / "calib")
        graph = export_graph(model, folder / "graph", images=(9, 2))
        build_engine(graph, folder / "engine", backend="onnxruntime")

    return Engine.open(shared.made("engine-of-image-prompts", make) / "engine")


@pytest.fixture
def pipes(origin: BasePipeline, taking: Engine) -> Iterator[tuple[StableDiffusionPipeline, StableDiffusionPipeline]]:
    """The floating-point pipeline, and one like it on the engine."""
    stock = load_pipeline(origin)
    with load_engine(taking) as runner:
        yield stock, pipeline_with_engine(load_pipeline(origin), taking, runner)


def load(pipe: DiffusionPipeline, *weights: dict[str, Any]) -> None:
    empty = [""] * len(weights)
    pipe.load_ip_adapter(list(weights), empty, empty, image_encoder_folder=None)


def drawn(pipe: DiffusionPipeline, *embeds: torch.Tensor, **options: object) -> torch.Tensor:
    given = {"ip_adapter_image_embeds": list(embeds)} if embeds else {}
    latents = initial_noise([3], pipe.unet.config)
    return pipe(PROMPT, latents=latents, num_inference_steps=2, output_type="latent", **given, **options).images


def check_same(stock: DiffusionPipeline, ours: DiffusionPipeline, *embeds: torch.Tensor) -> torch.Tensor:
    expected, found = (drawn(pipe, *embeds) for pipe in (stock, ours))
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)
    return found


def test_pictures_are_those_of_diffusers_network(pipes: tuple[Any, Any]) -> None:
    """Scales, several images, several adapters of different kinds, and none again."""
    stock, ours = pipes
    without, embeds = drawn(ours), image_embeds()
    plain, plus = random_ip_adapter(stock.unet), random_ip_adapter(stock.unet, "plus", seed=1)
    for pipe in pipes:
        load(pipe, plain)
    strong = check_same(stock, ours, embeds)
    assert (strong - without).abs().max() > 0.05
    for scale in (0.3, 0.0, {"down": {"block_0": [0.9]}, "up": {"block_1": [0.0, 0.5]}}):
        for pipe in pipes:
            pipe.set_ip_adapter_scale(scale)
        weaker = check_same(stock, ours, embeds)
        assert not torch.equal(weaker, strong)
    check_same(stock, ours, image_embeds(images=2))
    for pipe in pipes:
        load(pipe, plain, plus)
        pipe.set_ip_adapter_scale([0.4, 0.8])
    check_same(stock, ours, embeds, image_embeds("plus"))
    for pipe in pipes:
        pipe.unload_ip_adapter()
    assert ours.unet.attn_processors == {}
    assert torch.equal(drawn(ours), without)


def test_inputs_are_made_once_per_prompt(pipes: tuple[Any, Any]) -> None:
    _, ours = pipes
    load(ours, random_ip_adapter(pipes[0].unet))
    adapters, embeds, like = ours.unet.ip_adapters, image_embeds(), torch.zeros(2, 4, 8, 8)
    first = adapters.inputs([embeds], like)
    assert adapters.inputs([embeds], like) is first
    ours.set_ip_adapter_scale(0.5)
    second = adapters.inputs([embeds], like)
    torch.testing.assert_close(second["image_values"], 0.5 * first["image_values"])
    embeds.mul_(2)
    assert adapters.inputs([embeds], like) is not second
    assert first["image_bias"][0].tolist() == [0.0] * 4 + [-1e4] * 14


def test_the_reach_is_the_most_that_prompts_can_add() -> None:
    """Tokens of an attention of two columns and one of three; two prompts, the second for one sample alone."""
    slots = ImageSlots(2, 2, (ImageSlot("a", 0, 2, 1.0, "a.to_out.0"), ImageSlot("b", 2, 3, 1.0)))
    values = torch.tensor([[[1.0, -3, 0.5, 0, -0.25], [2, 1, 0, 1, 0]], [[0, 0, 0, 0, 0], [0, 4, 0, 0, 0]]])
    second = torch.tensor([[[0.0, 0, -8, 0, 0]], [[10, 0, 0, 0, 0]]])
    made = packed(slots, torch.zeros(2, 4, 8, 8), [(values, values), (second, second)])
    assert made["image_reach"].tolist() == [[3 + 0, 1 + 8], [4 + 10, 0 + 0]]
    floating = ImageSlots(2, 2, (ImageSlot("a", 0, 5, 1.0),))
    assert "image_reach" not in packed(floating, torch.zeros(2, 4, 8, 8), [(values, values)])


def test_a_copy_has_adapters_of_its_own(pipes: tuple[Any, Any]) -> None:
    _, ours = pipes
    load(ours, random_ip_adapter(pipes[0].unet))
    strong = drawn(ours, image_embeds())
    copied = copy.deepcopy(ours.unet)
    ours.set_ip_adapter_scale(0.1)
    ours.unet = copied
    assert torch.equal(drawn(ours, image_embeds()), strong)
    assert copied.encoder_hid_proj is copied.ip_adapters.projection


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_generate_encodes_pictures_as_diffusers_does(pipes: tuple[Any, Any], kind: str, tmp_path: Path) -> None:
    stock, ours = pipes
    file, picture = write_ip_adapter(tmp_path, stock.unet, kind), control_picture(size=40)
    stock.load_ip_adapter(str(tmp_path), "", file.name)
    stock.set_ip_adapter_scale(0.7)
    adapter = IpAdapter.load(file, ours)
    for guidance in (1.0, 3.0):
        latents = initial_noise([3], ours.unet.config)
        options: dict[str, Any] = {"latents": latents, "num_inference_steps": 3, "guidance_scale": guidance}
        expected = stock(PROMPT, ip_adapter_image=picture, **options).images[0]
        found = generate(
            ours,
            Prompt("one", PROMPT),
            schedule=Schedule(3),
            guidance_scale=guidance,
            seed=3,
            images=[ImagePrompt(adapter, picture, 0.7)],
        )
        assert np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= 1
        without = generate(ours, Prompt("one", PROMPT), schedule=Schedule(3), guidance_scale=guidance, seed=3)
        assert np.abs(np.asarray(found, np.int16) - np.asarray(without, np.int16)).max() > 3


def test_pictures_with_image_prompts_share_the_loras(pipes: tuple[Any, Any], tmp_path: Path) -> None:
    stock, ours = pipes
    adapter = IpAdapter.load(write_ip_adapter(tmp_path, stock.unet), ours)
    load(ours, random_ip_adapter(stock.unet))
    own = prompted(ours.unet, [ImagePrompt(adapter, control_picture())], guided=True)
    assert own.loras is ours.unet.loras
    assert own.ip_adapters is ours.unet.ip_adapters
    assert ours.unet.prompted is None
    assert own.prompted is not None
    assert copy.deepcopy(own).prompted is own.prompted


def test_strengths_out_of_range_and_files_without_an_encoder_are_refused(
    pipes: tuple[Any, Any], tmp_path: Path
) -> None:
    stock, ours = pipes
    file = write_ip_adapter(tmp_path, stock.unet)
    adapter, picture = IpAdapter.load(file, ours), control_picture()
    with pytest.raises(InputError, match="scale of nan is out of range"):
        ImagePrompt(adapter, picture, float("nan"))
    three = [ImagePrompt(adapter, picture)] * 3
    with pytest.raises(InputError, match="3 image prompts at once, this engine takes 2: export with --image-adapters"):
        generate(ours, Prompt("one", PROMPT), schedule=Schedule(2), guidance_scale=1.0, images=three)
    with pytest.raises(InputError, match="takes no image prompts: export with --image-tokens"):
        IpAdapter.load(file, stock)
    (tmp_path / "image_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="has no image encoder: put it into"):
        IpAdapter.load(file, ours)


def changed(weights: dict[str, dict[str, torch.Tensor]], part: str, key: str, value: object) -> dict[str, Any]:
    return weights | {
        part: {name: tensor for name, tensor in weights[part].items() if name != key}
        | ({} if value is None else {key: value})
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: {"image_proj": own["image_proj"]}, "it is no IP-Adapter"),
        (lambda own: {"image_proj": {"proj.weight": 3}, "ip_adapter": {}}, "it is no IP-Adapter"),
        (lambda own: changed(own, "ip_adapter", "1.to_k_ip.weight", torch.ones(8, 9)), r"another model: .* \[8, 9\]"),
        (lambda own: changed(own, "ip_adapter", "3.to_v_ip.weight", None), "another model: 3.to_v_ip.weight is absent"),
        (lambda own: changed(own, "ip_adapter", "99.to_v_ip.weight", torch.ones(8, 128)), "absent here"),
        (lambda own: changed(own, "ip_adapter", "1.to_k_ip.weight", torch.full((8, 128), torch.nan)), "not finite"),
        (lambda own: changed(own, "image_proj", "proj.weight", None), "FaceID"),
        (lambda own: changed(own, "image_proj", "proj.bias", None), "not whole"),
        (lambda own: changed(own, "image_proj", "norm.weight", torch.ones(3)), "tokens of width 3, not 128"),
        (lambda own: own | {"image_proj": {"weight": torch.ones(1)}}, "of no kind that is known"),
    ],
)  # fmt: skip
def test_weights_of_something_else_are_refused(
    pipes: tuple[Any, Any], change: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    stock, ours = pipes
    with pytest.raises(InputError, match=words) as refused:
        load(ours, change(random_ip_adapter(stock.unet)))
    assert "\n" not in str(refused.value)
    assert ours.unet.ip_adapters is None


def test_what_the_engine_does_not_take_is_refused(pipes: tuple[Any, Any]) -> None:
    stock, ours = pipes
    plain = random_ip_adapter(stock.unet)
    refusals = {
        "export with --image-adapters 3": lambda: load(ours, plain, plain, plain),
        "FaceID kind, which is not supported": lambda: load(ours, random_ip_adapter(stock.unet, "face-id")),
        "cannot take image_embeds in added_cond_kwargs: load it first": lambda: drawn(ours, image_embeds()),
        "load an IP-Adapter first": lambda: ours.unet.encoder_hid_proj,
        "it has no down_blocks": lambda: ours.set_ip_adapter_scale(0.5),
    }
    masks = IPAdapterMaskProcessor().preprocess([torch.ones(1, 8, 8)], height=64, width=64)
    loaded = {
        "an image prompt has 12 tokens, this engine takes 9: export with --image-tokens 12": lambda: drawn(
            ours, image_embeds(images=3)
        ),
        "give ip_adapter_image, or unload it": lambda: drawn(ours),
        "another image encoder": lambda: drawn(ours, image_embeds()[..., :7]),
        "image embeds of 2 IP-Adapters, 1 are loaded": lambda: drawn(ours, image_embeds(), image_embeds()),
        "cannot take": lambda: drawn(
            ours, image_embeds(), cross_attention_kwargs={"ip_adapter_masks": [masks.reshape(1, 1, 64, 64)]}
        ),
    }
    for words, ask in refusals.items():
        with pytest.raises(InputError, match=words):
            ask()
    load(ours, plain)
    for words, ask in loaded.items():
        with pytest.raises(InputError, match=words):
            ask()


def test_an_engine_without_image_prompts_says_what_to_do(origin: BasePipeline, engine: Engine) -> None:
    with load_engine(engine) as runner:
        pipe = pipeline_with_engine(load_pipeline(origin), engine, runner)
        with pytest.raises(InputError, match="no IP-Adapter can be loaded: export with --image-tokens"):
            load(pipe, random_ip_adapter(load_pipeline(origin).unet))
