"""KServe's protocol, asked by Triton's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.serve.http.live_server import PROMPT, STEPS, Answer, LiveServer

INFER = "/v2/models/small/infer"
TEXT = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}
FEW = {"name": "steps", "shape": [1], "datatype": "INT32", "data": [STEPS]}


@pytest.fixture
def client(server: LiveServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as opened:
        yield opened


def inputs(*, binary: bool, **values: tuple[str, np.ndarray]) -> list[triton.InferInput]:
    found = []
    for name, (kind, array) in values.items():
        found.append(triton.InferInput(name, list(array.shape), kind))
        found[-1].set_data_from_numpy(array, binary_data=binary)
    return found


def asked(*, binary: bool, seeds: list[int]) -> list[triton.InferInput]:
    prompts = np.array([PROMPT.encode(), b"a small blue square"], dtype=np.object_)
    return inputs(
        binary=binary,
        prompt=("BYTES", prompts),
        negative_prompt=("BYTES", np.array([b"a green triangle"], dtype=np.object_)),
        steps=("INT32", np.array([STEPS, 2 * STEPS], np.int32)),
        guidance_scale=("FP32", np.array([2.0], np.float32)),
        seed=("INT64", np.array(seeds, np.int64)),
    )


def test_tritons_client_finds_the_server_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("small")
    assert client.is_model_ready("fp", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]


def test_tritons_client_reads_the_tensors(client: triton.InferenceServerClient) -> None:
    found = client.get_model_metadata("small")
    kinds = {one["name"]: one["datatype"] for one in found["inputs"]}
    assert kinds["prompt"] == "BYTES"
    assert found["outputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 64, 64, 3]}]


def test_tritons_client_draws_in_the_binary_and_in_the_json_form_alike(
    client: triton.InferenceServerClient, server: LiveServer
) -> None:
    binary = client.infer("small", asked(binary=True, seeds=[7, 8]), request_id="mine")
    outputs = [triton.InferRequestedOutput("image", binary_data=False)]
    plain = client.infer("small", asked(binary=False, seeds=[7]), outputs=outputs, model_version="1")
    pixels = binary.as_numpy("image")
    assert (pixels.shape, pixels.dtype) == ((2, 64, 64, 3), np.uint8)
    assert np.abs(pixels.astype(int) - plain.as_numpy("image")).max() <= 1  # one seed counts up
    assert binary.get_response()["id"] == "mine"
    assert server.metric("s2p_http_responses_total", status="200") > 0


def test_tritons_client_is_told_why(client: triton.InferenceServerClient) -> None:
    given = inputs(binary=True, prompt=("BYTES", np.array([b"a"] * 5, np.object_)))
    with pytest.raises(InferenceServerException, match="1 to 4 are allowed"):
        client.infer("small", given)
    with pytest.raises(InferenceServerException, match="no model 'other'"):
        client.infer("other", given)


def infer(server: LiveServer, *tensors: object, head: str | None = None, tail: bytes = b"", **more: object) -> Answer:
    body = json.dumps({"inputs": tensors} | more).encode()
    headers = {"inference_header_content_length": str(len(body)) if head is None else head} if tail or head else {}
    return server.ask("POST", INFER, body + tail, content_type="application/json", **headers)


def test_nested_data_and_a_shape_of_two_axes_are_fine(server: LiveServer) -> None:
    found = infer(server, TEXT | {"shape": [1, 1], "data": [[PROMPT]]}, FEW, id="x")
    assert found.status == 200, found.body
    assert (found.data["id"], found.data["outputs"][0]["shape"]) == ("x", [1, 64, 64, 3])
    assert len(found.data["outputs"][0]["data"]) == 64 * 64 * 3


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([], "inputs"),
        ([FEW], "prompt is missing"),
        ([TEXT, TEXT], "twice"),
        ([TEXT, FEW | {"name": "colour"}], "'colour'"),
        ([TEXT, FEW | {"datatype": "INT64"}], "'steps' of INT64"),
        ([TEXT | {"datatype": "FP64"}], "FP64"),
        ([TEXT | {"data": [1]}], "must be BYTES"),
        ([TEXT | {"data": []}], "0 values"),
        ([TEXT | {"shape": [2]}], "1 values"),
        ([TEXT | {"shape": []}], "shape"),
        ([TEXT | {"shape": [10**12]}], "shape"),
        ([TEXT | {"shape": [-1]}], "shape"),
        ([TEXT | {"data": ["\ud800"]}], ""),
        ([TEXT, FEW | {"data": [True]}], "must be INT32"),
        ([TEXT, FEW | {"data": [2**40]}], "must be INT32"),
        ([TEXT, FEW | {"data": [0]}], "steps"),
        ([TEXT, FEW | {"shape": [3], "data": [1, 2, 3]}], "3 values for 1 prompts"),
        ([TEXT, FEW | {"name": "guidance_scale", "datatype": "FP32", "data": [1e300]}], "must be FP32"),
        ([TEXT, FEW | {"name": "seed", "datatype": "INT64", "data": [-1]}], "seed"),
        ([TEXT | {"data": None, "parameters": {"binary_data_size": 5}}], "binary_data_size"),
        ([TEXT | {"data": None, "parameters": {"binary_data_size": True}}], "binary_data_size"),
        ([TEXT | {"surprise": 1}], "surprise"),
    ],
)
def test_tensors_that_do_not_fit_are_400(server: LiveServer, tensors: list[object], said: str) -> None:
    found = infer(server, *tensors)
    assert found.status == 400, found.body
    assert said in found.data["error"]


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"priority": 1}},
        {"outputs": [{"name": "latents"}]},
        {"outputs": [{"name": "image", "parameters": {"classification": 2}}]},
        {"id": "x" * 1000},
    ],
)
def test_what_is_asked_of_the_answer_is_refused_by_name(server: LiveServer, more: dict[str, Any]) -> None:
    found = infer(server, TEXT, **more)
    assert found.status == 400
    assert isinstance(found.data["error"], str)


@pytest.mark.parametrize(
    ("size", "tail", "head"),
    [
        (9, b"\x05\0\0\0hello", "999999"),
        (9, b"\x05\0\0\0hello", "-3"),
        (9, b"\x05\0\0\0hello", "9" * 5000),
        (9, b"\xff\xff\xff\xffhello", None),
        (2, b"\x05\0", None),
        (9, b"\x05\0\0\0hell\xff", None),
        (9, b"\x05\0\0\0hello and more", None),
    ],
)
def test_bytes_that_do_not_fit_are_400(server: LiveServer, size: int, tail: bytes, head: str | None) -> None:
    tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    assert infer(server, tensor, tail=tail, head=head).status == 400


def test_numbers_of_half_a_width_or_not_finite_are_400(server: LiveServer) -> None:
    for data in (b"\0\0\xc0\x7f", b"\0\0\0"):
        tensor = {"name": "guidance_scale", "shape": [1], "datatype": "FP32"}
        found = infer(server, TEXT, tensor | {"parameters": {"binary_data_size": len(data)}}, tail=data)
        assert found.status == 400, found.body


def test_other_versions_and_models_are_404(server: LiveServer) -> None:
    for path in ("/v2/models/small/versions/2", "/v2/models/other", "/v2/models/other/ready"):
        found = server.get(path)
        assert found.status == 404
        assert isinstance(found.data["error"], str)
