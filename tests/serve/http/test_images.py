"""OpenAI's API, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading

import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from s2p_deploy.serve.http.images import ImageForm, progress
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.request import ImageRequest, RequestFuture
from s2p_deploy.serve.service import ServiceSettings
from tests.serve.http.conftest import Opening
from tests.serve.http.live_server import IMAGES, MANY_STEPS, PROMPT, SOME_STEPS, STEPS, LiveServer, live_server


def pixels_of(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


def test_openais_client_draws_and_a_seed_says_which_picture(client: openai.OpenAI) -> None:
    asked = {"seed": 7, "num_inference_steps": STEPS, "guidance_scale": 2.0, "negative_prompt": "a blue square"}
    two = client.images.generate(prompt=PROMPT, model="small", n=2, size="64x64", extra_body=asked)
    one = client.images.generate(prompt=PROMPT, model="small", extra_body=asked | {"seed": 8})
    found = [pixels_of(image.b64_json or "") for image in (two.data or []) + (one.data or [])]
    assert [picture.shape for picture in found] == [(64, 64, 3)] * 3
    assert np.abs(found[1].astype(int) - found[2]).max() <= 1  # a seed's picture does not depend on its neighbours
    assert np.abs(found[0].astype(int) - found[2]).max() > 10


def test_openais_client_streams_progress_and_then_the_picture(client: openai.OpenAI) -> None:
    asked = {"seed": 7, "num_inference_steps": SOME_STEPS}
    events = list(client.images.generate(prompt=PROMPT, stream=True, extra_body=asked))
    kinds = [event.type for event in events]
    done = [event.to_dict()["done"] for event in events[:-1]]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) == {"image_generation.progress"}
    assert done == sorted(done)
    assert len(set(done)) > 1
    plain = client.images.generate(prompt=PROMPT, extra_body=asked)
    streamed = pixels_of(events[-1].to_dict()["b64_json"])
    assert np.abs(streamed.astype(int) - pixels_of((plain.data or [])[0].b64_json or "")).max() <= 1


def test_openais_client_lists_the_models(client: openai.OpenAI) -> None:
    found = [model.to_dict() for model in client.models.list()]
    assert [model["id"] for model in found] == ["small", "fp"]
    assert found[0]["ready"] is True
    assert (found[0]["steps"], found[0]["guidance_scale"], found[0]["sizes"]) == (20, 2.0, ["64x64"])
    assert "unipc" in found[0]["schedulers"]
    assert found[0]["long_prompts"] is False


def test_what_is_left_out_comes_from_the_model_and_a_seed_by_chance(server: LiveServer) -> None:
    answers = [server.ask("POST", IMAGES, json.dumps({"prompt": PROMPT}).encode(), content_type="application/json")]
    answers.append(server.draw(seed=None))
    seeds = [answer.data["data"][0]["seed"] for answer in answers]
    assert [answer.status for answer in answers] == [200, 200]
    assert seeds[0] != seeds[1]
    assert answers[0].headers["cache-control"] == "no-store"


OPTIONAL = tuple(name for name, field in ImageForm.model_fields.items() if not field.is_required())
OPENAIS_OWN = ("background", "moderation", "output_compression", "output_format", "quality", "style", "user")


@given(nulls=st.sets(st.sampled_from(OPTIONAL + OPENAIS_OWN)), prompt=st.text(min_size=1))
def test_null_is_what_was_left_out(nulls: set[str], prompt: str) -> None:
    form = ImageForm.model_validate_json(json.dumps({"prompt": prompt} | dict.fromkeys(nulls)))
    assert form == ImageForm(prompt=prompt)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_null_field_beside_others_leaves_them_as_they_are(name: str) -> None:
    every = {"model": "small", "n": 2, "size": "64x64", "response_format": "b64_json", "seed": 3, "stream": True}
    every |= {"num_inference_steps": 4, "guidance_scale": 2.0, "negative_prompt": "x", "scheduler": "ddim"}
    every |= {"long_prompts": True, "lora": [{"name": "ink", "weight": 0.5}]}
    every |= {
        "controlnet": [{"name": "edges", "image": "aGk=", "scale": 0.5, "start": 0.1, "end": 0.9}],
        "ip_adapter": [{"name": "style", "image": "aGk=", "scale": 0.5}],
    }
    assert set(every) == set(OPTIONAL)
    found = ImageForm.model_validate({"prompt": PROMPT} | every | {name: None})
    assert found.model_dump() == ImageForm(prompt=PROMPT).model_dump() | every | {
        name: ImageForm.model_fields[name].default
    }


def test_a_form_of_nulls_draws_what_the_model_draws(server: LiveServer) -> None:
    nulls = dict.fromkeys(set(OPTIONAL + OPENAIS_OWN) - {"seed", "num_inference_steps"})
    found, plain = server.draw(**nulls), server.draw()
    assert (found.status, plain.status) == (200, 200)
    assert len(found.data["data"]) == 1
    pictures = [pixels_of(answer.data["data"][0]["b64_json"]).astype(int) for answer in (found, plain)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert server.draw(num_inference_steps=None, seed=None, **nulls).status == 200


def test_openais_client_may_send_null(client: openai.OpenAI) -> None:
    asked = {"seed": 7, "num_inference_steps": STEPS, "negative_prompt": None, "scheduler": None}
    found = client.images.generate(
        prompt=PROMPT, model=None, n=None, size=None, quality=None, response_format=None, style=None, extra_body=asked
    )
    assert pixels_of((found.data or [])[0].b64_json or "").shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("form", "param", "said"),
    [
        ({"quality": "hd"}, "quality", "not supported"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": "x" * 2001}, "prompt", "2000"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt", "2000"),
        ({"prompt": "\ud800"}, "prompt", ""),
        ({"n": 0}, "n", ""),
        ({"n": 5}, "n", "1 to 4"),
        ({"n": 10**9}, "n", "1 to 4"),
        ({"n": 2, "stream": True}, "stream", "one picture"),
        ({"size": "512x512"}, "size", "64x64"),
        ({"size": "64"}, "size", ""),
        ({"seed": -1}, "seed", ""),
        ({"seed": 1.5}, "seed", ""),
        ({"seed": 2**63}, "seed", ""),
        ({"num_inference_steps": 0}, "num_inference_steps", ""),
        ({"num_inference_steps": 10**6}, "num_inference_steps", "1 to 900"),
        ({"guidance_scale": -0.5}, "guidance_scale", ""),
        ({"guidance_scale": 1e9}, "guidance_scale", "0 to 50"),
        ({"guidance_scale": float("nan")}, "guidance_scale", ""),
        ({"scheduler": "magic"}, None, "unknown scheduler"),
        ({"long_prompts": True}, "long_prompts", "reads prompts of one chunk"),
        ({"long_prompts": "yes"}, "long_prompts", ""),
        ({"scheduler": "flow-euler"}, None, "'flow-euler' is for flow matching"),
        ({"line\nbreak": 1}, "line break", "not supported"),
        ({"half of a character: \ud800": 1}, None, "unicode"),
    ],
)
def test_what_cannot_be_drawn_is_400_with_the_field_at_fault(
    server: LiveServer, form: dict[str, object], param: str | None, said: str
) -> None:
    found = server.draw(**form)
    assert found.status == 400, found.body
    error = found.data["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]
    assert error["request_id"] == found.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty: send a JSON object such as"),
        (b"null", "the body is no JSON object: send a JSON object such as"),
        (b"[]", "the body is no JSON object: send a JSON object such as"),
        (b"{", "the body is not JSON: Expecting property name enclosed in double quotes at character 1: send"),
        (b'{"prompt": "\xe9"}', "the body is not UTF-8 at byte 12: send JSON in UTF-8"),
        (b"[" * 100_000, "the body is nested too deep: send a JSON object such as"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "the body has a number of more than 4300 digits: send a smaller one"),
    ],
)
def test_a_body_that_is_no_form_is_400_with_what_is_wrong(server: LiveServer, body: bytes, said: str) -> None:
    found = server.ask("POST", IMAGES, body, content_type="application/json")
    assert (found.status, found.data["error"]["type"]) == (400, "invalid_request_error")
    assert found.data["error"]["message"].startswith(said)


def test_there_is_no_other_model(server: LiveServer) -> None:
    found = server.draw(model="gpt-image-1")
    assert (found.status, found.data["error"]["code"]) == (404, "model_not_found")
    assert "small, fp" in found.data["error"]["message"]


@pytest.mark.parametrize("header", ["0", "-1", "nan", "soon", ""])
def test_a_deadline_must_be_a_time(server: LiveServer, header: str) -> None:
    assert server.draw({"x_request_timeout": header}).status == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_is_kept(server: LiveServer, stream: bool) -> None:
    found = server.draw({"x_request_timeout": "0.2"}, num_inference_steps=MANY_STEPS, stream=stream)
    if stream:
        last = found.body.decode().strip().split("\n\n")[-1]
        assert last.startswith("event: error\n")
        assert "deadline_exceeded" in last
    else:
        assert (found.status, found.data["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server: LiveServer, stream: bool) -> None:
    before = server.metric("s2p_requests_total", model="small", ending="cancelled")
    wish = {"prompt": PROMPT, "num_inference_steps": MANY_STEPS, "stream": stream, "n": 1 if stream else 2}
    body = json.dumps(wish).encode()
    head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as left:
        left.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_for(lambda: server.metric("s2p_active_requests", model="small") == wish["n"])
    after = before + float(str(wish["n"]))
    server.wait_for(lambda: server.metric("s2p_requests_total", model="small", ending="cancelled") == after, 1)
    assert server.metric("s2p_active_requests", model="small") == 0


def test_a_full_queue_is_429_with_a_time_to_wait_and_takes_none_of_several(opening: Opening) -> None:
    metrics = Metrics()
    settings = ServiceSettings(batching="one", max_waiting=1, max_active=1, batches=(1, 2))
    with live_server({"small": opening("small", metrics, settings)}, metrics=metrics) as busy:
        slow = threading.Thread(target=busy.draw, kwargs={"num_inference_steps": SOME_STEPS})
        slow.start()
        busy.wait_for(lambda: busy.metric("s2p_active_requests", model="small") == 1)
        found = busy.draw(n=3)
        assert (found.status, found.data["error"]["type"]) == (429, "rate_limit_error")
        assert int(found.headers["retry-after"]) >= 1
        assert busy.draw(n=1).status == 200  # the one that had been taken of three was given up again
        slow.join()


@pytest.fixture
def future() -> RequestFuture:
    return RequestFuture(
        "a", ImageRequest("a red circle", steps=4, guidance_scale=1.0, seed=0), 4, submitted=0.0, deadline=60.0
    )


def test_progress_is_yielded_when_it_changes_until_the_end(future: RequestFuture) -> None:
    async def yielded() -> list[tuple[int, int]]:
        heard = progress(future, silence=3600)
        future.progress = (1, 4)
        first = await anext(heard)
        future.progress = (2, 4)
        second = await anext(heard)
        future.set_result(Image.new("RGB", (1, 1)))
        return [first, second, *[late async for late in heard]]

    assert asyncio.run(yielded()) == [(1, 4), (2, 4)]


def test_a_request_that_waits_is_heard_of(future: RequestFuture) -> None:
    async def yielded() -> list[tuple[int, int]]:
        heard = progress(future, silence=0)
        return [await anext(heard) for _ in range(3)]

    assert asyncio.run(yielded()) == [(0, 0)] * 3
