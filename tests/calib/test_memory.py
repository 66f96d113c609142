from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

from s2p_deploy.calib.memory import GIB, SHARE, LiveBytes, memory_of, samples_that_fit, usable_memory
from s2p_deploy.errors import MissingEnvironmentError
from s2p_deploy.families import IndexedDenoiser, zero_inputs
from tests.counted_memory import Counted


def test_live_bytes_rise_and_fall_with_the_tensors() -> None:
    with LiveBytes() as live:
        x = torch.zeros(1000)
        assert live.now == 4096  # in blocks of 512
        view = x[:10]
        assert live.now == 4096
        y = x + 1
        assert (live.now, live.most) == (8192, 8192)
        del x
        assert live.now == 8192  # the view keeps it
        del view, y
        assert (live.now, live.most) == (0, 8192)


def test_what_autograd_keeps_lives() -> None:
    with LiveBytes() as live:
        x = torch.ones(1024, requires_grad=True)
        y = x.exp().exp().exp()
        assert live.now == 4 * 4096  # exp keeps its result
        y.sum().backward()
        del y
        assert live.now == 2 * 4096  # x and its gradient


def test_fake_tensors_are_counted_as_real_ones() -> None:
    counted = []
    for mode in (FakeTensorMode(), torch.enable_grad()):
        with mode, LiveBytes() as live:
            x = torch.empty(64, 64, requires_grad=True)
            (x @ x).relu().sum().backward()
        counted.append(live.most)
    assert counted[0] == counted[1] > 0


def test_tensors_from_elsewhere_are_counted_once() -> None:
    live, x = LiveBytes(), torch.zeros(256)
    live.add([x, x, x[:2]])
    assert live.now == 1024


def call_of(denoiser: IndexedDenoiser) -> Callable[[int], object]:
    @torch.no_grad()
    def run(samples: int) -> object:
        return denoiser(*zero_inputs(denoiser, tokens=16, batch=samples).arguments())

    return run


def test_as_many_samples_as_fit_are_found_by_measuring_one_and_two(float_denoiser: IndexedDenoiser) -> None:
    run = call_of(float_denoiser)

    def counted(room: float) -> Counted:
        return Counted(room / SHARE + 1)

    needed = {samples: counted(0).most_during(lambda n=samples: run(n)) for samples in (1, 8, 16)}  # type: ignore[misc]
    room = (needed[8] + needed[16]) / 2
    assert samples_that_fit(run, counted(room)) == 8
    assert samples_that_fit(run, counted(room), beside=needed[8] // 2) == 4
    assert samples_that_fit(run, counted(1000 * GIB)) == 128
    with pytest.raises(MissingEnvironmentError, match=r"one sample takes 0\.0 GiB of memory beside 0\.0 GiB"):
        samples_that_fit(run, counted(needed[1] - 1000))


def test_a_cpu_has_no_counters() -> None:
    assert memory_of(torch.device("cpu")) is None


def test_memory_is_planned_with_where_it_is_counted_or_limited() -> None:
    assert usable_memory(torch.device("cpu"), None) is None
    assert usable_memory(torch.device("cpu"), 24 * GIB) == 24 * GIB
