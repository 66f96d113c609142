"""Full-size networks, traced on the meta device: the graph holds every weight of the denoiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from s2p_deploy.export.tracing import trace_denoiser
from s2p_deploy.families import network_config, weight_destinations
from s2p_deploy.records import TimestepTable, TransformSpec
from tests.families.test_full_size import network

TIMESTEPS = TimestepTable("none", {}, 1, (0.0,), np.zeros(1))


@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3.5-large"])
@pytest.mark.slow
def test_the_graph_holds_every_weight(name: str) -> None:
    config = network_config(network(name))
    traced = trace_denoiser(config, TIMESTEPS, TransformSpec(), tokens=77 + 256, dtype=torch.float16)
    graph = traced.model.graph
    assert [value.name for value in graph.inputs][-1] == "time_projections"
    wanted = {f"network.{key}" for key, place in weight_destinations(config).items() if place == "denoiser"}
    assert wanted <= graph.initializers.keys()
