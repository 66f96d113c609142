"""The repository in a real server: health, metadata, pictures, neighbours, bad input, a changed engine."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from s2p_deploy.engines import load_engine
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import Schedule, generate, pipeline_with_engine
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Prompt
from s2p_deploy.serve.triton.repository import RepositoryOptions, export_repository
from tests.serve.triton.real_server import triton_server, unpacked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.serve.conftest import Tiny
    from tests.serve.triton.real_server import RealServer

http = pytest.importorskip("tritonclient.http")

pytestmark = pytest.mark.slow

PROMPT, NEGATIVE = "a large red circle, white background", "a small blue square"
GUIDANCE = 2.0


@pytest.fixture(scope="module")
def repository(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unpacked()
    out = tmp_path_factory.mktemp("repository") / "models"
    export_repository(tiny.engine, tiny.base, out, RepositoryOptions("tiny", queue_delay=50_000))
    return out


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with triton_server(repository, tmp_path_factory.mktemp("server")) as running:
        assert running.process.poll() is None, running.said
        yield running


def picture(server: RealServer, **asked: float | str | bytes) -> NDArray[np.uint8]:
    kinds = {"prompt": "BYTES", "negative_prompt": "BYTES", "steps": "INT32", "seed": "INT64", "guidance_scale": "FP32"}
    types = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
    given = []
    for name, value in asked.items():
        data = value.encode() if isinstance(value, str) else value
        given.append(http.InferInput(name, [1], kinds[name]))
        given[-1].set_data_from_numpy(np.array([data], dtype=types[kinds[name]]))
    with http.InferenceServerClient(server.url, network_timeout=120) as client:
        answer = client.infer("tiny", given).as_numpy("image")
    assert isinstance(answer, np.ndarray)
    return answer


def drawn_here(tiny: Tiny, steps: int, seed: int, negative: str = "") -> NDArray[np.uint8]:
    """What ``s2p-deploy generate`` draws."""
    torch.set_num_threads(1)  # as the server's processes have: text encoder and VAE round differently with more
    with load_engine(tiny.engine) as runner:
        pipe = pipeline_with_engine(load_pipeline(tiny.base), tiny.engine, runner)
        prompt = Prompt("p", PROMPT, negative)
        return np.asarray(generate(pipe, prompt, schedule=Schedule(steps), guidance_scale=GUIDANCE, seed=seed))


def test_the_server_is_ready_and_says_what_the_model_takes(server: RealServer) -> None:
    with http.InferenceServerClient(server.url) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny_denoiser")
        inputs = client.get_model_metadata("tiny")["inputs"]
        config = client.get_model_config("tiny_denoiser")
    assert {entry["name"]: entry["datatype"] for entry in inputs}["prompt"] == "BYTES"
    assert config["max_batch_size"] == 32
    assert config["dynamic_batching"]["preferred_batch_size"] == [4]


def test_a_picture_is_the_one_that_generate_draws(server: RealServer, tiny: Tiny) -> None:
    drawn = picture(server, prompt=PROMPT, negative_prompt=NEGATIVE, steps=5, seed=3, guidance_scale=GUIDANCE)
    np.testing.assert_array_equal(drawn, drawn_here(tiny, 5, 3, NEGATIVE))


def test_what_is_left_out_comes_from_the_recipe(server: RealServer, tiny: Tiny) -> None:
    steps = recipe_from_data(tiny.engine.manifest.recipe, "tiny").sampling.steps
    np.testing.assert_array_equal(picture(server, prompt=PROMPT), drawn_here(tiny, steps, 0))


def test_steps_of_two_clients_meet_in_one_batch_and_change_no_bit(server: RealServer, tiny: Tiny) -> None:
    asked = [{"steps": 12, "seed": 1}, {"steps": 25, "seed": 2}]
    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(lambda one: picture(server, prompt=PROMPT, **one), asked))
    for one, found in zip(asked, drawn, strict=True):
        np.testing.assert_array_equal(found, drawn_here(tiny, **one))
    with http.InferenceServerClient(server.url) as client:
        statistics = client.get_inference_statistics("tiny_denoiser")["model_stats"][0]
    assert 4 in {entry["batch_size"] for entry in statistics["batch_stats"]}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 101}, "steps is 101"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": b"\xff\xfe"}, "prompt is not UTF-8"),
        ({"prompt": "x" * 2001}, "prompt has 2001 characters"),
    ],
)
def test_what_makes_no_sense_is_an_error_and_no_crash(server: RealServer, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(http.InferenceServerException, match=said) as caught:
        picture(server, **{"prompt": PROMPT, "steps": 2} | asked)
    assert "400" in str(caught.value)
    assert picture(server, prompt=PROMPT, steps=2).shape == (64, 64, 3)


def test_a_step_that_is_wrong_is_an_error_of_the_denoiser_alone(server: RealServer) -> None:
    inputs = [
        http.InferInput("sample", [1, 4, 8, 8], "FP32").set_data_from_numpy(np.zeros((1, 4, 8, 8), np.float32)),
        http.InferInput("timestep_index", [1, 1], "INT64").set_data_from_numpy(np.array([[10**6]], np.int64)),
        http.InferInput("encoder_hidden_states", [1, 24, 128], "FP32").set_data_from_numpy(
            np.zeros((1, 24, 128), np.float32)
        ),
    ]
    with http.InferenceServerClient(server.url) as client:
        with pytest.raises(http.InferenceServerException, match="outside the scale table"):
            client.infer("tiny_denoiser", inputs)
        assert client.is_server_ready()


def test_a_changed_engine_is_not_loaded(repository: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "models"
    shutil.copytree(repository, spoiled)
    data = spoiled / "tiny_denoiser" / "1" / "engine" / "denoiser.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with triton_server(spoiled, tmp_path) as running:
        assert running.process.wait(60) != 0
        assert "denoiser.onnx.data was changed after it was written" in running.said
