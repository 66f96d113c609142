"""Where references compute, without a GPU: ``cpu:0`` is another name of the CPU, and so another device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2p_deploy.context import Context
from s2p_deploy.validation import Chain
from s2p_deploy.validation.placement import CPU, float64_device, onloaded, reference_device

OTHER = torch.device("cpu", 0)


class Network:
    """Remembers where it was."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moves: list[torch.device] = []

    def to(self, device: torch.device) -> Network:
        self.device = device
        self.moves.append(device)
        return self


def test_references_are_where_the_engine_is_unless_another_device_is_named(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on_cpu, cuda = chain.engine, torch.device("cuda")
    on_gpu = replace(on_cpu, environment=on_cpu.environment | {"device": "CUDA GPU"})
    assert (on_cpu.on_gpu, on_gpu.on_gpu) == (False, True)
    assert [reference_device(engine, Context()) for engine in (on_cpu, on_gpu)] == [CPU, cuda]
    assert [reference_device(engine, Context(device="cuda")) for engine in (on_cpu, on_gpu)] == [cuda, cuda]
    assert reference_device(on_gpu, Context(device="cpu")) == CPU


@pytest.mark.parametrize(("capability", "there"), [((9, 0), True), ((8, 0), True), ((8, 9), False), ((12, 0), False)])
def test_float64_is_for_gpus_that_are_made_for_it(
    capability: tuple[int, int], there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    cuda = torch.device("cuda", 1)
    assert float64_device(cuda) == (cuda if there else CPU)
    assert float64_device(OTHER) == OTHER


def test_a_network_is_on_the_device_while_it_is_needed_and_goes_back() -> None:
    network = Network(CPU)

    def interrupted() -> None:
        with onloaded(network, OTHER):
            assert network.device == OTHER
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert network.moves == [OTHER, CPU]


def test_a_network_that_is_there_already_stays() -> None:
    network = Network(OTHER)
    with onloaded(network, OTHER):
        pass
    assert network.moves == []
