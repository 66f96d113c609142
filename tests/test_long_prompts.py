"""Prompts of several chunks, and textual inversions, on engines in stock pipelines: what floating point draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from s2p_deploy.calib import calibrate
from s2p_deploy.cli import main
from s2p_deploy.engines import BuildOptions, ShapeProfile, Span, build_engine, load_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline, divide_text, load_pipeline, long_prompt_embeds, resolve_base, text_tokens
from s2p_deploy.pipeline import Schedule, generate, pipeline_with_engine
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, ExportedGraph, Prompt
from s2p_deploy.serve.generation_loop import Observer
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.service import ServiceSettings, open_service
from tests.small_pipelines import sibling, tiny_base

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.serve.batching import Batching

pytestmark = pytest.mark.slow  # a graph and two engines of every kind

CAPTIONS = [
    "a large red circle at the top left, white background",
    "a small blue square at the top right, gray background",
    "a small green triangle at the bottom left, black background",
]
FOUR = ", ".join(CAPTIONS * 2)  # chunks of the bundled tokenizer
STEPS, TOKENS = 6, 8
TOLERANCE = 2e-3  # of pictures in [0, 1]; float32 on either side, other orders of summation
KINDS = ("shapes", "sd2", "sdxl", "sd3")


@dataclass(frozen=True)
class Pair:
    """A pipeline in floating point and the same with an engine of recipe fp that takes one to four chunks."""

    floating: DiffusionPipeline
    engine: DiffusionPipeline

    def agree(self, **options: object) -> np.ndarray:
        expected, found = (drawn(pipe, **options) for pipe in (self.floating, self.engine))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        return found


def drawn(pipe: DiffusionPipeline, **options: object) -> np.ndarray:
    if "prompt" in options and "StableDiffusion3" in type(pipe).__name__:
        options["max_sequence_length"] = TOKENS
    generator = torch.Generator().manual_seed(5)
    found = pipe(generator=generator, num_inference_steps=STEPS, guidance_scale=2.0, output_type="np", **options)
    return np.asarray(found.images)


@pytest.fixture(scope="module", params=[(kind, backend) for kind in KINDS for backend in ("onnxruntime", "openvino")])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    kind, backend = request.param
    folder: Path = tmp_path_factory.mktemp(kind)
    base = resolve_base("shapes") if kind == "shapes" else sibling(kind)
    recipe = Recipe.load("fp", {"sampling": {"steps": STEPS, "max_sequence_length": TOKENS}})
    model = calibrate(base, recipe, None, folder / "calib")
    engine = build_engine(export_graph(model, folder / "graph", chunks=(1, 4)), folder / "engine", backend=backend)
    floating = load_pipeline(base)
    with load_engine(engine, schedules=[model.timesteps.timesteps[list(model.timesteps.calibrated_indices)]]) as runner:
        yield Pair(floating, pipeline_with_engine(floating, engine, runner))


def test_prompts_of_one_to_four_chunks_are_the_pipelines_own(pair: Pair) -> None:
    assert len(divide_text(pair.floating, FOUR)) == 4
    plain = pair.agree(prompt=CAPTIONS[0])
    for prompt in (CAPTIONS[0], ", ".join(CAPTIONS[:2]), FOUR):
        embeds = long_prompt_embeds(pair.engine, prompt, "black background", max_sequence_length=TOKENS)
        found = pair.agree(**embeds)
        assert np.abs(found - plain).max() > 10 * TOLERANCE, "the text changes the picture"


def test_weighted_states_of_several_prompts_run_as_one_batch(pair: Pair) -> None:
    """As weighting tools give them: some tokens' states scaled, prompts of one call of one length."""
    each = [
        long_prompt_embeds(pair.engine, prompt, fewest=4, max_sequence_length=TOKENS) for prompt in (CAPTIONS[0], FOUR)
    ]
    shortest = min(embeds["prompt_embeds"].shape[1] for embeds in each)
    joined = {name: torch.cat([embeds[name] for embeds in each]) for name in each[0]}
    assert joined["prompt_embeds"].shape[1] == shortest
    joined["prompt_embeds"] = joined["prompt_embeds"].clone()
    joined["prompt_embeds"][:, 3:6] *= 1.3
    assert len(pair.agree(**joined)) == 2


def test_more_than_four_chunks_are_refused(pair: Pair) -> None:
    most = 4 * text_tokens(pair.engine, TOKENS)
    embeds = long_prompt_embeds(pair.engine, CAPTIONS[0], fewest=5, max_sequence_length=TOKENS)
    with pytest.raises(InputError, match=f"takes texts of {most // 4} to {most} tokens, got {most * 5 // 4}: build"):
        drawn(pair.engine, **embeds)


def test_a_picture_of_a_long_prompt_is_the_one_of_its_states(pair: Pair) -> None:
    prompt, schedule = Prompt("id", FOUR, "black background"), Schedule(STEPS, max_sequence_length=TOKENS)
    options = {"schedule": schedule, "guidance_scale": 2.0}
    long, cut = (generate(pair.engine, prompt, **options, long_prompts=long) for long in (True, False))
    expected = generate(pair.floating, prompt, **options, long_prompts=True)
    assert np.abs(np.asarray(long, np.int16) - np.asarray(expected, np.int16)).max() <= 1
    assert np.abs(np.asarray(long, np.int16) - np.asarray(cut, np.int16)).max() > 10


def test_textual_inversions_of_one_vector_and_of_several(pair: Pair) -> None:
    """Both pipelines share their tokenizers and text encoders: the engine's is given the tokens."""
    if not hasattr(pair.engine, "load_textual_inversion"):
        pytest.skip("diffusers' pipeline of Stable Diffusion 3 loads none")
    random = torch.Generator().manual_seed(3)
    loaded = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    for names in loaded[: 2 if hasattr(pair.engine, "text_encoder_2") else 1]:
        tokenizer, encoder = (getattr(pair.engine, name) for name in names)
        scale = encoder.get_input_embeddings().weight.std()
        for token, vectors in (("<one>", 1), ("<three>", 3)):
            embedding = scale * torch.randn(vectors, encoder.config.hidden_size, generator=random)
            pair.engine.load_textual_inversion({token: embedding}, tokenizer=tokenizer, text_encoder=encoder)
    try:
        plain = drawn(pair.engine, prompt="a circle at the top left, white background")
        for prompt in ("a <one> circle at the top left, white background", "a <three> circle, white background"):
            found = pair.agree(prompt=prompt)
            assert np.abs(found - plain).max() > 10 * TOLERANCE, "the new token changes the picture"
        embeds = long_prompt_embeds(pair.engine, f"{FOUR[:100]} <three> circle, a <one> square", fewest=2)
        pair.agree(**embeds)
    finally:
        for names in loaded[: 2 if hasattr(pair.engine, "text_encoder_2") else 1]:
            tokenizer, encoder = (getattr(pair.engine, name) for name in names)
            pair.engine.unload_textual_inversion(tokenizer=tokenizer, text_encoder=encoder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def graph(base: BasePipeline, tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    folder = tmp_path_factory.mktemp("chunks")
    recipe = Recipe.load("fp", {"sampling": {"steps": STEPS, "guidance_scale": 2.0}})
    return export_graph(calibrate(base, recipe, None, folder / "calib"), folder / "graph", chunks=(1, 3))


@pytest.fixture(scope="module")
def engine(graph: ExportedGraph, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(graph, tmp_path_factory.mktemp("engine") / "engine", backend="onnxruntime")


class Batches(Observer):
    """Keeps the pictures of every batch."""

    def __init__(self) -> None:
        self.pictures: list[int] = []

    def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
        self.pictures.append(pictures)


@pytest.mark.parametrize("batching", ["step", "request", "one"])
def test_a_service_draws_prompts_of_other_numbers_of_chunks_side_by_side(
    base: BasePipeline, engine: Engine, batching: Batching
) -> None:
    texts = [CAPTIONS[0], ", ".join(CAPTIONS[:2]), CAPTIONS[1], ", ".join(CAPTIONS[:2]), FOUR]
    requests = [ImageRequest(text, STEPS, 2.0, seed, long_prompts=True) for seed, text in enumerate(texts)]
    floating, batches = load_pipeline(base), Batches()
    with open_service(engine, base, ServiceSettings(batching, batches=(8,)), batches) as service:
        assert service.info.long_prompts
        futures = [service.submit(request, timeout=60) for request in requests]
        with pytest.raises(InputError, match="takes texts of 24 to 72 tokens, got 96"):
            futures.pop().result()
        for future in futures:
            asked = future.request
            prompt, options = Prompt("id", asked.prompt), {"guidance_scale": 2.0, "seed": asked.seed}
            expected = generate(floating, prompt, schedule=Schedule(STEPS), long_prompts=True, **options)
            found = future.result()
            assert np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= 1
        assert service.alive
    assert (max(batches.pictures) > 1) == (batching != "one"), "requests of one length met"


def test_a_service_reads_tokens_that_were_loaded_into_its_pipeline(base: BasePipeline, engine: Engine) -> None:
    text, width = "a <mine> circle", 128
    embedding = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    floating = load_pipeline(base)
    floating.load_textual_inversion({"<mine>": embedding})
    with open_service(engine, base, ServiceSettings(batches=(2,)), Observer()) as service:
        plain, request = ImageRequest("a circle", STEPS, 2.0, 0), ImageRequest(text, STEPS, 2.0, 0)
        before = service.submit(plain, timeout=60).result()
        service._engine.stock.pipe.load_textual_inversion({"<mine>": embedding})
        found = np.asarray(service.submit(request, timeout=60).result(), np.int16)
    expected = generate(floating, Prompt("id", text), schedule=Schedule(STEPS), guidance_scale=2.0, seed=0)
    assert np.abs(found - np.asarray(expected, np.int16)).max() <= 1
    assert np.abs(found - np.asarray(before, np.int16)).max() > 10


def test_an_engine_of_two_chunks_at_least_fills_shorter_prompts_up(
    base: BasePipeline, graph: ExportedGraph, tmp_path: Path
) -> None:
    options = BuildOptions(profile=ShapeProfile(1, 2, 2, tokens=Span(48, 48, 72)))
    engine = build_engine(graph, tmp_path / "engine", backend="onnxruntime", options=options)
    pipe = load_pipeline(base)
    with load_engine(engine) as runner:
        with_engine = pipeline_with_engine(pipe, engine, runner)
        asked = {"schedule": Schedule(STEPS), "guidance_scale": 2.0}
        generate(with_engine, Prompt("id", CAPTIONS[0]), **asked, long_prompts=True)
        with pytest.raises(InputError, match="takes texts of 48 to 72 tokens, got 24"):
            generate(with_engine, Prompt("id", CAPTIONS[0]), **asked)


def test_the_command_line_reads_long_prompts(
    base: BasePipeline, graph: ExportedGraph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calib, engine, picture = graph.folder.parent / "calib", f"{tmp_path}/engine", tmp_path / "picture.png"
    opened = f"{tmp_path}/graph"
    model = ["--model", str(base.folder)]
    assert main(["export", str(calib), "--out", opened, "--chunks", "1..3", *model]) == 0
    assert main(["inspect", opened]) == 0
    assert "1 to 3 chunks of 24 tokens" in capsys.readouterr().out
    build = ["build", opened, "--backend", "onnxruntime", "--out", engine]
    assert main([*build, "--chunks", "1:2:4"]) == 2
    assert "takes 1 to 3 chunks of 24 tokens" in capsys.readouterr().err
    assert main([*build, "--chunks", "1:1:2"]) == 0
    long = ["generate", engine, "--prompt", ", ".join(CAPTIONS[:2]), "--out", str(picture), "--steps", "2", *model]
    assert main(long) == 0
    assert "has 2 chunks, only the first was read (--long-prompts reads all)" in capsys.readouterr().out
    cut = np.asarray(Image.open(picture), np.int16)
    assert main([*long, "--long-prompts"]) == 0
    assert "chunks" not in capsys.readouterr().out
    assert np.abs(np.asarray(Image.open(picture), np.int16) - cut).max() > 10
    four = [FOUR if argument == ", ".join(CAPTIONS[:2]) else argument for argument in long]
    assert main([*four, "--long-prompts"]) == 2
    assert "takes texts of 24 to 48 tokens, got 96" in capsys.readouterr().err
