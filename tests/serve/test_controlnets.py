"""Calls of one ControlNet by several requests are one batch, and each gets what the network itself gives it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import SD3ControlNetModel

from s2p_deploy.families import denoiser_of, load_pipeline, resolve_base
from s2p_deploy.serve.batching import batch_key, run_calls
from s2p_deploy.serve.controlnets import ServedControlNet
from s2p_deploy.serve.generation_task import EngineCall, GenerationTask
from tests.small_controlnets import small_controlnet
from tests.small_pipelines import PIPELINES

if TYPE_CHECKING:
    from diffusers import ModelMixin

Arguments = dict[str, Any]


@pytest.fixture(scope="module", params=["shapes", "shapes-sdxl", "shapes-sd3"])
def network(request: pytest.FixtureRequest) -> ModelMixin:
    source = request.param if request.param == "shapes" else str(PIPELINES / request.param)
    return small_controlnet(denoiser_of(load_pipeline(resolve_base(source))))


def arguments(network: ModelMixin, seed: int, timestep: float, scale: float) -> Arguments:
    """What diffusers' pipelines call such a ControlNet with, for a guided picture."""
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=random)

    config, latents = network.config, some(network.config.in_channels, 8, 8)
    if isinstance(network, SD3ControlNetModel):
        return {
            "hidden_states": latents,
            "timestep": torch.full((2,), timestep),
            "encoder_hidden_states": some(8, config.joint_attention_dim),
            "pooled_projections": some(config.pooled_projection_dim),
            "joint_attention_kwargs": None,
            "controlnet_cond": some(config.in_channels, 8, 8),
            "conditioning_scale": scale,
            "return_dict": False,
        }
    added = {}
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": some(pooled), "time_ids": some(6).abs() * 64}
    return {
        "sample": latents,
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": some(24, config.cross_attention_dim),
        "controlnet_cond": some(3, 64, 64),
        "conditioning_scale": scale,
        "class_labels": None,
        "added_cond_kwargs": added,
        "guess_mode": False,
        "return_dict": False,
    }


def flat(result: tuple[Any, ...]) -> list[torch.Tensor]:
    return [tensor for part in result for tensor in (part if isinstance(part, list | tuple) else [part])]


def test_a_batch_gives_every_request_what_the_network_gives_it(network: ModelMixin) -> None:
    served = ServedControlNet.of(network)
    own = served.for_request()
    assert isinstance(own, type(network))
    assert own.config == network.config
    given = [arguments(network, 0, 981.0, 1.0), arguments(network, 1, 20.0, 0.5), arguments(network, 2, 500.0, 0.0)]
    tasks = [GenerationTask(None, partial(served.for_request(), **one)) for one in given]
    for task in tasks:
        task.resume()
    calls = [task.waiting_for for task in tasks if isinstance(task.waiting_for, EngineCall)]
    assert [call.controlnet for call in calls] == [served] * 3
    assert [call.samples for call in calls] == [2] * 3
    assert len({batch_key(call, mixed_timesteps=False) for call in calls}) == 1, "timesteps of a denoiser's engine"
    for task, output in zip(tasks, run_calls(served.runner, calls, 6), strict=True):
        task.resume(output)
        assert task.done == 0, "it is no step"
    results = [task.picture for task in tasks]
    for one, found in zip(given, results, strict=True):
        with torch.no_grad():
            expected = network(**one)
        assert [type(part) for part in found] == [type(part) for part in expected]
        for residual, right in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(residual, right, rtol=1e-5, atol=1e-5)
    assert not any(residual.any() for residual in flat(results[2])), "a strength of 0"


def test_two_controlnets_share_no_batch(network: ModelMixin) -> None:
    calls = []
    for served in (ServedControlNet.of(network), ServedControlNet.of(network)):
        task = GenerationTask(None, partial(served.for_request(), **arguments(network, 0, 1.0, 1.0)))
        task.resume()
        calls.append(task.waiting_for)
    assert len({batch_key(call, mixed_timesteps=True) for call in calls}) == 2


def test_the_runner_takes_arrays_too(network: ModelMixin) -> None:
    served = ServedControlNet.of(network)
    task = GenerationTask(None, partial(served.for_request(), **arguments(network, 0, 1.0, 1.0)))
    task.resume()
    inputs = {name: value.contiguous() for name, value in task.waiting_for.inputs.items()}
    tensors = served.runner.infer_tensors(inputs)
    arrays = served.runner.infer({name: value.numpy() for name, value in inputs.items()})
    assert all((tensors[name].numpy() == arrays[name]).all() for name in tensors)
