"""OpenAI's edits and variations, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import TYPE_CHECKING

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.responses import PlainTextResponse

from s2p_deploy.pipeline import Schedule, StartPicture, generate, open_pipeline
from s2p_deploy.records import Prompt
from s2p_deploy.serve.http.edits import EDITS, VARIATIONS
from s2p_deploy.serve.http.images import HttpLimits
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.http.middleware import BodyLimitMiddleware, Uploads
from s2p_deploy.shapes.scenes import parse, render
from tests.serve.http.live_server import PROMPT, STEPS, Answer, LiveServer, live_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Message, Receive, Scope, Send

    from s2p_deploy.records import Engine
    from tests.serve.conftest import Tiny
    from tests.serve.http.conftest import Opening

FEW = {"num_inference_steps": STEPS, "seed": 7}
BOUNDARY = "of-parts"


def picture(side: int = 64, mode: str = "RGB") -> bytes:
    """What the bundled autoencoder keeps: a red square at the right."""
    drawn = Image.fromarray(render(parse("a large red square at the top right, white background")))
    return file_of(drawn.resize((side, side)).convert(mode))


def file_of(made: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    made.save(buffer, kind)
    return buffer.getvalue()


def see_through(left: bool = True) -> bytes:
    """A picture whose left half, or nothing of it, is transparent."""
    made = Image.open(io.BytesIO(picture(mode="RGBA")))
    if left:
        made.paste((0, 0, 0, 0), (0, 0, 32, 64))
    return file_of(made)


def pixels_of(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


Part = tuple[str, object]  # a field, or with bytes a file


def form_of(parts: list[Part]) -> bytes:
    body = b""
    for name, value in parts:
        filename = '; filename="f.png"' if isinstance(value, bytes) else ""
        head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{filename}\r\n\r\n'
        body += head.encode() + (value if isinstance(value, bytes) else str(value).encode()) + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def post(server: LiveServer, path: str, parts: list[Part], **headers: str) -> Answer:
    given = {"content_type": f"multipart/form-data; boundary={BOUNDARY}"} | headers
    return server.ask("POST", path, form_of(parts), **given)


def edited(server: LiveServer, *parts: Part, **fields: object) -> Answer:
    wish = {"prompt": PROMPT} | FEW | fields
    return post(server, EDITS, [*wish.items(), *(parts or (("image", picture()),))])


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


def test_openais_client_edits_and_the_picture_is_the_one_it_would_be_alone(
    client: openai.OpenAI, floating: Engine, tiny: Tiny
) -> None:
    image = picture()
    asked = {**FEW, "guidance_scale": 2.0, "strength": 0.7, "scheduler": "ddim"}
    found = client.images.edit(image=io.BytesIO(image), prompt=PROMPT, model="fp", n=2, size="64x64", extra_body=asked)
    pictures = [pixels_of(one.b64_json or "") for one in found.data or []]
    with open_pipeline(floating, tiny.base) as opened:
        for seed, drawn in zip((7, 8), pictures, strict=True):
            schedule, start = Schedule(STEPS, "ddim", size=(64, 64)), StartPicture.read(image, strength=0.7)
            options = {"schedule": schedule, "guidance_scale": 2.0, "seed": seed, "start": start}
            assert np.abs(np.asarray(generate(opened.pipe, Prompt("", PROMPT), **options)) - drawn).max() <= 1


def test_openais_client_edits_what_a_mask_marks(client: openai.OpenAI) -> None:
    """By the mask's transparency, or the picture's own."""
    plain, marked = picture(mode="RGBA"), see_through()
    asked, sent = FEW | {"strength": 0.7, "scheduler": "ddim"}, client.images.edit
    masked = sent(image=("p.png", plain), mask=("m.png", marked), prompt=PROMPT, extra_body=asked)
    own = sent(image=[("p.png", marked)], prompt=PROMPT, extra_body=asked)  # as image[]
    whole = sent(image=("p.png", plain), prompt=PROMPT, extra_body=asked)
    found = [pixels_of((one.data or [])[0].b64_json or "") for one in (masked, own, whole)]
    original = np.asarray(Image.open(io.BytesIO(picture()))).astype(int)
    kept = [np.abs(one - original)[:, 40:].mean() for one in found]
    assert max(kept[:2]) < kept[2] / 2, kept


def test_openais_client_asks_for_variations(client: openai.OpenAI) -> None:
    found = client.images.create_variation(image=("p.png", picture()), n=2, extra_body=FEW | {"strength": 0.5})
    first, second = (pixels_of(one.b64_json or "") for one in found.data or [])
    assert np.abs(first - second).max() > 10


def test_an_edit_is_streamed(server: LiveServer) -> None:
    found = edited(server, stream="true")
    kinds = [line for line in found.body.decode().splitlines() if line.startswith("event: ")]
    assert found.status == 200
    assert kinds[-1] == "event: image_generation.completed"


def test_edits_and_drawings_meet_in_one_batch_and_do_not_change_each_other(server: LiveServer) -> None:
    async def all_at_once() -> list[Answer]:
        asked = [
            (server.draw, {}),
            (edited, {"server": server, "strength": "0.9"}),
            (edited, {"server": server, "num_inference_steps": 11}),
            (server.draw, {"num_inference_steps": 13}),
        ]
        return await asyncio.gather(*(asyncio.to_thread(call, **options) for call, options in asked * 2))

    found = [pixels_of(answer.data["data"][0]["b64_json"]) for answer in asyncio.run(all_at_once())]
    for first, second in zip(found[:4], found[4:], strict=True):
        assert np.abs(first - second).max() <= 1
    alone = pixels_of(edited(server, strength="0.9").data["data"][0]["b64_json"])
    assert np.abs(found[1] - alone).max() <= 1


def test_fields_of_no_characters_are_left_out(server: LiveServer) -> None:
    plain = edited(server)
    found = edited(server, model="", n="", size="", negative_prompt="", scheduler="", strength="", stream="")
    assert (plain.status, found.status) == (200, 200)
    first, second = (pixels_of(one.data["data"][0]["b64_json"]) for one in (plain, found))
    assert np.abs(first - second).max() <= 1


IMAGE: Part = ("image", picture())


@pytest.mark.parametrize(
    ("parts", "param", "said"),
    [
        ([], "image", "image is missing: send a PNG, JPEG or WebP file"),
        ([("image", "text")], "image", "image must be sent as a file"),
        ([IMAGE, IMAGE], "image", "image is given twice"),
        ([IMAGE, ("image[]", picture())], "image[]", "is given twice"),
        ([IMAGE, ("n", 2), ("n", 3)], "n", "n is given twice"),
        ([IMAGE, ("prompt", b"file")], "prompt", "prompt is given twice"),
        ([IMAGE, ("picture", b"file")], "picture", "a file picture is not supported: there are image, mask"),
        ([IMAGE, ("quality", "hd")], "quality", "quality is not supported: there are prompt, "),
        ([IMAGE, ("n", "many")], "n", "valid integer"),
        ([IMAGE, ("n", 5)], "n", "1 to 4"),
        ([IMAGE, ("strength", 0)], "strength", "greater than 0"),
        ([IMAGE, ("strength", 1.5)], "strength", "less than or equal to 1"),
        ([IMAGE, ("strength", "nan")], "strength", "finite"),
        ([IMAGE, ("strength", 0.1)], None, "leaves none of 3 steps: raise it, or take more steps"),
        ([IMAGE, ("size", "128x128")], "size", "size 128x128 is not served: use 64x64"),
        ([IMAGE, ("response_format", "url")], "response_format", "b64_json"),
        ([IMAGE, ("scheduler", "magic")], None, "unknown scheduler"),
        ([("image", b"no picture")], None, "the picture is no PNG, JPEG or WebP file"),
        ([("image", picture(32))], None, "the picture has 32x32 pixels: give one of 64x64"),
        ([("image", file_of(Image.new("CMYK", (64, 64)), "JPEG"))], None, "is of CMYK"),
        ([("image", file_of(Image.new("I;16", (64, 64))))], None, "is of 16 bits"),
        ([IMAGE, ("mask", picture(32))], None, "the mask has 32x32 pixels"),
        ([IMAGE, ("mask", file_of(Image.new("L", (64, 64))))], None, "the mask marks nothing"),
        ([IMAGE, ("mask", b"")], None, "the mask is no PNG"),
    ],
)
def test_what_cannot_be_drawn_is_400_with_what_is_wrong(
    server: LiveServer, parts: list[Part], param: str | None, said: str
) -> None:
    given = {name for name, _ in parts}
    base = [
        (name, value) for name, value in (FEW | {"prompt": PROMPT}).items() if name not in given or name == "prompt"
    ]
    found = post(server, EDITS, [*base, *parts])
    assert found.status == 400, found.body
    assert (found.data["error"]["type"], found.data["error"]["param"]) == ("invalid_request_error", param)
    assert said in found.data["error"]["message"]


def test_a_prompt_is_needed_for_edits_and_not_for_variations(server: LiveServer) -> None:
    parts = [*FEW.items(), IMAGE]
    assert post(server, EDITS, parts).data["error"]["message"] == "prompt is missing"
    assert post(server, VARIATIONS, parts).status == 200
    masked = post(server, VARIATIONS, [*parts, ("mask", picture())])
    assert masked.data["error"]["message"] == "a file mask is not supported: there are image"


@pytest.mark.parametrize(
    ("kind", "status"), [("application/json", 415), ("text/plain", 415), ("", 415), ("multipart/form-data", 400)]
)
def test_only_a_form_is_taken(server: LiveServer, kind: str, status: int) -> None:
    assert post(server, EDITS, [IMAGE], content_type=kind).status == status


def test_a_compressed_form_is_refused(server: LiveServer) -> None:
    assert post(server, EDITS, [IMAGE], content_encoding="gzip").status == 415


def test_uploads_are_bounded(opening: Opening) -> None:
    metrics = Metrics()
    limits = HttpLimits(upload_bytes=2**15, body_bytes=2**10, sizes=frozenset({(32, 32)}))
    with live_server({"fp": opening("fp", metrics)}, limits, metrics=metrics) as live:
        assert edited(live).status == 200
        assert edited(live, IMAGE, ("mask", picture(64)), ("negative_prompt", "x" * 2**15)).status == 413
        assert live.draw(negative_prompt="x" * 2**10).status == 413
        other = edited(live, ("image", picture(32)))  # the server allows it, the engine does not take it
        assert (other.status, "this engine" in other.data["error"]["message"]) == (400, True)


@pytest.mark.parametrize("field", ["controlnet", "ip_adapter"])
def test_pictures_of_adapters_are_as_large_as_other_uploads(opening: Opening, field: str) -> None:
    """In JSON and in a form: what is refused is the adapter, which there is not, and no longer the size."""
    metrics, photograph = Metrics(), [{"name": "none", "image": "A" * 2**21}]
    limits = HttpLimits(adapter_pictures=True, upload_bytes=2**22)
    with live_server({"fp": opening("fp", metrics)}, limits, metrics=metrics) as live:
        answers = [live.draw(**{field: photograph}), edited(live, **{field: json.dumps(photograph)})]
        found = [(answer.status, answer.data["error"]["param"]) for answer in answers]
        assert found == [(400, f"{field}.0.name")] * 2, answers
        assert live.draw(**{field: photograph * 2}).status == 413


def test_few_uploads_are_read_at_once() -> None:
    """The next gets 429 unless it is small, and there is room again when one is read."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await PlainTextResponse("read")(scope, receive, send)

    middleware = BodyLimitMiddleware(app, HttpLimits(), [Uploads((EDITS,), 2**10, 60, at_once=1, above=9)])

    async def asked(length: bytes = b"10", *, slow: bool = False) -> int:
        sent: list[Message] = []

        async def receive() -> Message:
            if slow:
                arrived.set()
                await go_on.wait()
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-length", length)]
        scope = {"type": "http", "method": "POST", "path": EDITS, "headers": headers, "state": {}}
        await middleware(scope, receive, send)
        return int(sent[0]["status"])

    async def all_of_them() -> list[int]:
        first = asyncio.ensure_future(asked(slow=True))
        await arrived.wait()
        second, small = await asked(), await asked(b"9")
        go_on.set()
        return [await first, second, small, await asked()]

    assert asyncio.run(all_of_them()) == [200, 429, 200, 200]


@pytest.fixture(scope="module")
def hasty(opening: Opening) -> Iterator[LiveServer]:
    metrics = Metrics()
    with live_server({"fp": opening("fp", metrics)}, HttpLimits(steps=3, pictures=2), metrics=metrics) as live:
        yield live


NAMES = [
    "image",
    "image[]",
    "mask",
    "prompt",
    "n",
    "size",
    "seed",
    "strength",
    "stream",
    "num_inference_steps",
    "x\r\ny",
]
VALUES: st.SearchStrategy[object] = st.one_of(
    st.sampled_from([picture(), picture(32), see_through(), see_through()[:200], b"", "1", "0.5", "64x64", "true", ""]),
    st.binary(max_size=40),
    st.text(st.characters(codec="utf-8"), max_size=20),
)


@settings(max_examples=60)
@given(
    parts=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=6),
    path=st.sampled_from([EDITS, VARIATIONS]),
    spoil=st.one_of(st.none(), st.tuples(st.integers(0, 10**5), st.binary(min_size=1, max_size=4))),
)
def test_no_form_finds_a_defect(
    hasty: LiveServer, parts: list[Part], path: str, spoil: tuple[int, bytes] | None
) -> None:
    body = form_of([("prompt", PROMPT), ("num_inference_steps", 2), *parts])
    if spoil is not None:
        place = spoil[0] % len(body)
        body = body[:place] + spoil[1] + body[place + len(spoil[1]) :]
    found = hasty.ask("POST", path, body, content_type=f"multipart/form-data; boundary={BOUNDARY}")
    assert found.status in {200, 400}, found.body
    if found.status == 400:
        error = json.loads(found.body)["error"]
        assert error["type"] == "invalid_request_error"
        assert "\n" not in error["message"]
