"""Requests with LoRAs of their own in one batch; LoRAs that come and go while requests are drawn."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.errors import InputError
from s2p_deploy.families.lora import GivenLora
from s2p_deploy.pipeline import Schedule, generate, open_pipeline
from s2p_deploy.pipeline.lora_files import loras_acting
from s2p_deploy.records import Prompt
from s2p_deploy.serve.generation_task import GenerationTask
from s2p_deploy.serve.loras import BatchedLoras
from s2p_deploy.serve.request import ImageRequest, LoraWeight, RequestFuture, UnknownLoraError
from s2p_deploy.serve.service import ImageService, ServiceSettings, open_service
from tests.serve.conftest import Tiny, branched
from tests.serve.test_service import Log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.shared_folder import SharedFolder

MINUTE = 60.0
PLAIN = ImageRequest("a large red circle", 8, 2.0, seed=1)


def asking(**weights: float) -> ImageRequest:
    """The same picture with LoRAs."""
    return replace(PLAIN, lora=tuple(LoraWeight(name, weight) for name, weight in weights.items()))


# strong, as the random network's attention decides little of a picture
FOUR = [PLAIN, asking(ink=9.0), asking(wash=8.0, ink=7.0), asking(ink=-6.0)]


def drawn(service: ImageService, *requests: ImageRequest) -> list[np.ndarray]:
    futures = [service.submit(request, timeout=MINUTE) for request in requests]
    return [np.asarray(future.result()).astype(int) for future in futures]


@pytest.fixture(scope="module")
def log() -> Log:
    return Log()


@pytest.fixture(scope="module")
def service(branched_tiny: Tiny, lora_files: dict[str, Path], log: Log) -> Iterator[ImageService]:
    """With batches of eight samples, four guided pictures, as the only ones."""
    settings = ServiceSettings(batches=(8,), loras=tuple(lora_files.items()))
    with open_service(branched_tiny.engine, branched_tiny.base, settings, log) as one:
        yield one


def check_four(service: ImageService, log: Log, most: int) -> None:
    """Draws four settings alone, then in one batch; ``most`` is how far a value of a picture may be from the other."""
    alone = [drawn(service, request)[0] for request in FOUR]
    log.batches.clear()
    log.wait_once = 2.0
    first = service.submit(replace(PLAIN, steps=20), timeout=MINUTE)  # while the texts of the others are encoded
    together = drawn(service, *FOUR)
    first.result()
    assert any(pictures == 4 for _, _, pictures in log.batches), "requests met"
    for one, other, request in zip(alone, together, FOUR, strict=True):
        assert np.abs(one - other).max() <= most, request
    apart = [np.abs(one - other).mean() for one, other in combinations(alone, 2)]
    assert min(apart) > 0.3, "each setting acts"


def test_four_settings_in_one_batch_are_the_pictures_alone(service: ImageService, log: Log) -> None:
    """Bit for bit on ONNX Runtime."""
    check_four(service, log, most=0)


@pytest.mark.slow
def test_four_settings_in_one_batch_on_openvino(tiny: Tiny, shared: SharedFolder, lora_files: dict[str, Path]) -> None:
    """Within a level of 255 for each value of a picture."""
    log, settings = Log(), ServiceSettings(batches=(8,), loras=tuple(lora_files.items()))
    with open_service(branched(tiny, shared, "openvino"), tiny.base, settings, log) as one:
        check_four(one, log, most=1)


def test_the_picture_is_that_of_generate(
    service: ImageService, branched_tiny: Tiny, lora_files: dict[str, Path]
) -> None:
    weights = {"ink": 0.7, "wash": 0.8, "words": 1.5}
    given = [GivenLora(lora_files[name], weight) for name, weight in weights.items()]
    with open_pipeline(branched_tiny.engine, branched_tiny.base) as opened:
        pipe, options = opened.pipe, {"schedule": Schedule(PLAIN.steps), "guidance_scale": 2.0, "seed": 1}
        with loras_acting(pipe, branched_tiny.base, given):
            wanted = np.asarray(generate(pipe, Prompt("", PLAIN.prompt), **options))
        without = np.asarray(generate(pipe, Prompt("", PLAIN.prompt), **options))
    before, found, after = drawn(service, PLAIN, asking(**weights), PLAIN)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(before, without)
    np.testing.assert_array_equal(after, without)


def test_the_part_for_the_text_encoder_acts_in_its_own_request(service: ImageService) -> None:
    """Also where no layer of the denoiser is changed; a weight of 0 is none."""
    plain, words, off, again = drawn(service, PLAIN, asking(words=1.0), asking(words=0.0, ink=0.0), PLAIN)
    assert np.abs(words - plain).mean() > 0.1
    np.testing.assert_array_equal(off, plain)
    np.testing.assert_array_equal(again, plain)


def test_requests_whose_ranks_do_not_fit_take_turns(service: ImageService, log: Log) -> None:
    """wide and wash have ten ranks of eight."""
    requests = [asking(wide=1.0), asking(wash=1.0), asking(wide=0.5), PLAIN, asking(wash=0.5)]
    alone = [drawn(service, request)[0] for request in requests]
    for one, other in zip(alone, drawn(service, *requests), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match=r"10 ranks together, this engine takes 8: leave one out"):
        service.submit(asking(wide=1.0, wash=1.0), timeout=MINUTE)


def test_ranks_have_the_order_of_names_whoever_came_first(service: ImageService) -> None:
    """A sum over ranks has other bits in another order."""
    for request in (asking(wide=1.0), asking(wash=1.0), asking(ink=1.0)):  # the last moves the others
        drawn(service, request)
    bank, keys = service.loras.bank, {one.name: one.key for one in service.loras.all}
    assert bank is not None
    rows = bank.strengths([{keys["ink"]: 1.0}, {keys["wash"]: 1.0}])
    np.testing.assert_array_equal(rows, [[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]])


def waiting(service: ImageService, name: str, **weights: float) -> RequestFuture:
    request = asking(**weights)
    return RequestFuture(name, request, 8, 0.0, MINUTE, service.loras.use(request.lora))


def test_nobody_with_loras_overtakes_who_waits_for_ranks(service: ImageService) -> None:
    """Those without pass; whoever needs nothing new might go on for ever."""
    batched = BatchedLoras(service.loras)
    active = [GenerationTask(waiting(service, "active", wash=1.0), lambda: Image.new("RGB", (8, 8)))]
    queue = [
        waiting(service, "same", wash=0.5),
        waiting(service, "small", ink=1.0),
        waiting(service, "large", wide=1.0),
        waiting(service, "none"),
        waiting(service, "same again", wash=1.0),
    ]
    assert [future.id for future in batched.fitting(active, queue)] == ["same", "small", "none"]
    assert [future.id for future in batched.fitting([], queue[2:])] == ["large", "none"]
    for future in [active[0].future, *queue]:
        service.loras.unuse(future.loras)


def test_a_lora_that_is_removed_or_replaced_stays_with_who_was_accepted(
    service: ImageService, lora_files: dict[str, Path]
) -> None:
    loras = service.loras
    loras.add("passing", lora_files["ink"])
    (wanted,) = drawn(service, asking(ink=1.0))
    first = service.submit(asking(passing=1.0), timeout=MINUTE)
    loras.add("passing", lora_files["wash"])
    second = service.submit(asking(passing=1.0), timeout=MINUTE)
    loras.remove("passing")
    np.testing.assert_array_equal(np.asarray(first.result()), wanted)
    np.testing.assert_array_equal(np.asarray(second.result()), drawn(service, asking(wash=1.0))[0])
    with pytest.raises(UnknownLoraError, match="there is no LoRA 'passing': those of this model are ink, wash, wide"):
        service.submit(asking(passing=1.0), timeout=MINUTE)
    with pytest.raises(UnknownLoraError):
        loras.remove("passing")


def test_what_is_removed_or_replaced_leaves_an_idle_engine(service: ImageService, lora_files: dict[str, Path]) -> None:
    """Without another request; else its memory would be taken twice."""
    loras, bank = service.loras, service.loras.bank
    assert bank is not None
    for forget in (lambda: loras.add("passing", lora_files["wash"]), lambda: loras.remove("passing")):
        key = loras.add("passing", lora_files["ink"]).key
        drawn(service, asking(passing=1.0))
        assert key in bank.names
        forget()
        end = time.monotonic() + MINUTE
        while key in bank.names:
            assert time.monotonic() < end, "it stays"
            time.sleep(0.001)


def test_all_loras_share_a_budget(branched_tiny: Tiny, lora_files: dict[str, Path], service: ImageService) -> None:
    sizes = {one.name: one.bytes for one in service.loras.all}
    settings = ServiceSettings(batches=(2,), loras=(("a", lora_files["ink"]),), lora_bytes=2 * sizes["ink"])
    with open_service(branched_tiny.engine, branched_tiny.base, settings, Log()) as small:
        small.loras.add("b", lora_files["ink"])
        small.loras.add("a", lora_files["ink"])  # in its own place
        with pytest.raises(InputError, match=r"LoRA 'c' takes 0.0 MiB of memory, 0.0 of 0 are left: remove another"):
            small.loras.add("c", lora_files["words"])
        future = small.submit(asking(b=1.0), timeout=MINUTE)
        small.loras.remove("b")
        with pytest.raises(InputError, match="remove another"):  # the request has it yet
            small.loras.add("c", lora_files["ink"])
        future.result()
        small.loras.add("c", lora_files["ink"])


def test_an_engine_without_branches_takes_none(tiny: Tiny, lora_files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no low-rank branches"):
        open_service(tiny.engine, tiny.base, ServiceSettings(loras=(("ink", lora_files["ink"]),)), Log())


def test_a_weight_beyond_the_engines_type_is_refused_before_it_meets_others(service: ImageService) -> None:
    with pytest.raises(InputError, match=r"strength 1e\+300 of LoRA 'ink' must be a finite number of float32"):
        service.submit(asking(ink=1e300), timeout=MINUTE)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_is_finite(weight: float) -> None:
    with pytest.raises(InputError, match="must be a finite number"):
        LoraWeight("ink", weight)


def test_a_lora_is_named_once() -> None:
    with pytest.raises(InputError, match="LoRA 'ink' is named twice"):
        replace(PLAIN, lora=(LoraWeight("ink"), LoraWeight("ink", 0.5)))
