"""LoRAs over HTTP: registered, listed, named in requests and removed; hostile files are one line each."""

from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from s2p_deploy.serve.http.edits import EDITS
from s2p_deploy.serve.http.images import HttpLimits
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.loras import ServedLora, ServedLoras
from s2p_deploy.serve.service import ServiceSettings, open_service
from tests.random_loras import in_kohya, in_peft, random_layers
from tests.serve.conftest import BLOCK
from tests.serve.http.live_server import PROMPT, STEPS, Answer, LiveServer, live_server
from tests.serve.http.test_edits import form_of, picture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from s2p_deploy.serve.service import ImageService
    from tests.serve.conftest import Tiny

TOKEN = "a-token-of-some-length"
LIMITS = HttpLimits(lora_bytes=2**17)
LAYER = f"{BLOCK}.attn1.to_q"


def served(tiny: Tiny, token: str | None, **loras: Path) -> AbstractContextManager[LiveServer]:
    """A server with LoRAs from its start, and memory for a few."""
    metrics = Metrics()
    settings = ServiceSettings(batches=(2,), loras=tuple(loras.items()), lora_bytes=2**16)

    def opened() -> ImageService:
        return open_service(tiny.engine, tiny.base, settings, metrics.observer("tiny"), "tiny")

    return live_server({"tiny": opened}, LIMITS, metrics=metrics, token=token)


@pytest.fixture(scope="module")
def live(branched_tiny: Tiny, lora_files: dict[str, Path]) -> Iterator[LiveServer]:
    with served(branched_tiny, TOKEN, ink=lora_files["ink"]) as one:
        yield one


def asked(live: LiveServer, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    return live.ask(method, path, body, authorization=f"Bearer {TOKEN}", **headers)


def drawn(live: LiveServer, **form: object) -> np.ndarray:
    answer = live.draw({"authorization": f"Bearer {TOKEN}"}, **form)
    assert answer.status == 200, answer.data
    return pixels(answer)


def pixels(answer: Answer) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data["data"][0]["b64_json"])))).astype(int)


def test_a_lora_is_registered_named_and_removed(live: LiveServer, lora_files: dict[str, Path]) -> None:
    answer = asked(live, "PUT", "/v1/loras/wash.2", lora_files["wash"].read_bytes())
    assert (answer.status, answer.data["name"], answer.data["rank"]) == (201, "wash.2", 4)
    assert answer.data["text_encoders"] == []
    listed = asked(live, "GET", "/v1/loras").data
    assert [(one["name"], one["text_encoders"]) for one in listed["data"]] == [
        ("ink", ["text_encoder"]),
        ("wash.2", []),
    ]
    assert (listed["lora_rank"], listed["most_bytes"]) == (8, 2**16)
    assert asked(live, "GET", "/v1/models").data["data"][0]["lora_rank"] == 8
    plain, changed = drawn(live), drawn(live, lora=[{"name": "wash.2", "weight": 9.0}, {"name": "ink"}])
    assert np.abs(plain - changed).mean() > 0.3
    assert asked(live, "DELETE", "/v1/loras/wash.2").status == 204
    gone = live.draw({"authorization": f"Bearer {TOKEN}"}, lora=[{"name": "wash.2"}])
    assert (gone.status, gone.data["error"]["param"], gone.data["error"]["code"]) == (404, "lora", "lora_not_found")
    assert asked(live, "DELETE", "/v1/loras/wash.2").status == 404
    np.testing.assert_array_equal(drawn(live), plain)


def test_edits_name_loras_too(live: LiveServer) -> None:
    def edited(lora: str) -> Answer:
        parts: list[tuple[str, object]] = [
            ("prompt", PROMPT),
            ("num_inference_steps", STEPS + 3),
            ("seed", 7),
            ("image", picture(64)),
            ("lora", lora),
        ]
        body = form_of(parts)
        return asked(live, "POST", EDITS, body, content_type="multipart/form-data; boundary=of-parts")

    plain, changed = edited(""), edited('[{"name": "ink", "weight": 9.5}]')
    assert (plain.status, changed.status) == (200, 200), changed.data
    assert np.abs(pixels(plain) - pixels(changed)).mean() > 0.3
    for wrong in ("ink", "{", '{"name": "ink"}', "[" * 10_000, '[{"name": "ink", "weight": "much"}]'):
        answer = edited(wrong)
        assert (answer.status, answer.data["error"]["param"].startswith("lora")) == (400, True), wrong


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        ([{"name": "ink", "weight": 11.0}], "lora.0.weight"),
        ([{"name": "ink", "scale": 1.0}], "lora.0.scale"),
        ([{"weight": 1.0}], "lora.0.name"),
        ([{"name": 5}], "lora.0.name"),
        ([{"name": "ink"}] * 17, "lora"),
        ([{"name": "ink"}, {"name": "ink", "weight": 0.5}], None),
        ("ink", "lora"),
    ],
)
def test_what_cannot_be_asked_for_is_named(live: LiveServer, lora: object, param: str | None) -> None:
    answer = live.draw({"authorization": f"Bearer {TOKEN}"}, lora=lora)
    assert (answer.status, answer.data["error"]["param"]) == (400, param), answer.data


def changed(file: Path, **tensors: torch.Tensor | None) -> bytes:
    """A LoRA with one pair of matrices replaced, or damaged."""
    return save({name: tensor for name, tensor in (load_file(file) | tensors).items() if tensor is not None})


def hostile(tiny: Tiny, file: Path) -> dict[str, tuple[bytes, str]]:
    """Files, and what is said of each."""
    whole, named = file.read_bytes(), next(name for name in load_file(file) if "lora_A" in name)
    of_rank_9 = random_layers(tiny.base, {"unet": [LAYER]}, rank=9)
    dora = random_layers(tiny.base, {"unet": [LAYER]}, dora=True)
    elsewhere = random_layers(tiny.base, {"unet": ["conv_in"]})
    nan = load_file(file)[named].clone()
    nan[0, 0] = torch.nan
    length = (2**16).to_bytes(8, "little")
    return {
        "empty": (b"", "LoRA bad is damaged or not whole"),
        "truncated": (whole[:-100], "LoRA bad is damaged or not whole"),
        "garbage": (length + b"{" * 2**16, "LoRA bad is damaged or not whole"),
        "endless header": ((2**60).to_bytes(8, "little"), "LoRA bad is damaged or not whole"),
        "pickle": (b"\x80\x02}q\x00.", "LoRA bad is pickled, which can run code"),
        "too much rank": (save(in_peft(of_rank_9)), "LoRA bad has rank 9, this engine takes 8"),
        "DoRA": (save(in_kohya(dora)), "bad is a DoRA"),
        "no branch": (save(in_peft(elsewhere)), "changes conv_in, where this engine has no branch"),
        "NaN": (changed(file, **{named: nan}), "holds NaN or infinity"),
        "half": (changed(file, **{named: None}), "without the down matrix of that layer"),
        "wrong model": (
            save({f"unet.{LAYER}.lora_A.weight": torch.ones(2, 7), f"unet.{LAYER}.lora_B.weight": torch.ones(16, 2)}),
            "bad is for another model than this pipeline",
        ),
        "no LoRA": (save({"alpha": torch.ones(1)}), "bad"),
    }


def test_hostile_files_are_one_line_each_and_the_server_goes_on(
    live: LiveServer, tiny: Tiny, lora_files: dict[str, Path]
) -> None:
    before = drawn(live, lora=[{"name": "ink"}])
    for what, (body, words) in hostile(tiny, lora_files["wash"]).items():
        answer = asked(live, "PUT", "/v1/loras/bad", body)
        message = answer.data["error"]["message"]
        assert answer.status == 400, (what, answer.data)
        assert words in message, what
        assert "/" not in message.replace("alpha / ", ""), f"{what}: the server's own paths stay its own"
        np.testing.assert_array_equal(drawn(live, lora=[{"name": "ink"}]), before)
    assert [one["name"] for one in asked(live, "GET", "/v1/loras").data["data"]] == ["ink"]


def test_what_is_too_large_is_refused(live: LiveServer, tiny: Tiny) -> None:
    """By its body, or by the memory that is left."""
    assert asked(live, "PUT", "/v1/loras/bad", bytes(2**17 + 1)).status == 413
    layers = random_layers(tiny.base, {"text_encoder": ["encoder.layers.0.mlp.fc1"]}, rank=60)
    answer = asked(live, "PUT", "/v1/loras/bad", save(in_peft(layers)))
    assert (answer.status, "of memory" in answer.data["error"]["message"]) == (400, True), answer.data


def test_one_at_a_time_is_read_and_added(
    live: LiveServer, lora_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may have as much as all memory for LoRAs; what is removed meanwhile makes room."""
    begun, go_on, add = threading.Event(), threading.Event(), ServedLoras.add

    def added_slowly(loras: ServedLoras, name: str, file: Path) -> ServedLora:
        begun.set()
        assert go_on.wait(60)
        return add(loras, name, file)

    monkeypatch.setattr(ServedLoras, "add", added_slowly)
    body = lora_files["wide"].read_bytes()
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(asked, live, "PUT", "/v1/loras/first", body)
        try:
            assert begun.wait(60)
            second = asked(live, "PUT", "/v1/loras/second", body)
            removed = asked(live, "DELETE", "/v1/loras/second")
        finally:
            go_on.set()
        assert (second.status, second.headers["retry-after"], removed.status) == (429, "1", 404)
        assert first.result().status == 201
    assert asked(live, "PUT", "/v1/loras/first", body).status == 201, "there is room again"
    assert asked(live, "DELETE", "/v1/loras/first").status == 204


@pytest.mark.parametrize("name", ["-x", "a" * 65, "%0a", "a%20b"])
def test_a_name_must_be_one(live: LiveServer, name: str, lora_files: dict[str, Path]) -> None:
    answer = asked(live, "PUT", f"/v1/loras/{name}", lora_files["ink"].read_bytes())
    assert (answer.status, "no name for a LoRA" in answer.data["error"]["message"]) == (400, True)


def test_only_clients_that_are_known_register(
    live: LiveServer, branched_tiny: Tiny, lora_files: dict[str, Path]
) -> None:
    body = lora_files["ink"].read_bytes()
    assert live.ask("PUT", "/v1/loras/x", body).status == 401
    assert asked(live, "PUT", "/v1/loras/x", body, content_encoding="gzip").status == 415
    assert asked(live, "PUT", "/v1/loras/x?model=other", body).status == 404
    with served(branched_tiny, None) as without:
        for method in ("PUT", "DELETE"):
            answer = without.ask(method, "/v1/loras/x", body)
            assert (answer.status, answer.data["error"]["code"]) == (403, "registration_closed")
        assert without.get("/v1/loras").data["data"] == []
