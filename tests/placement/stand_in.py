"""A stock pipeline and a service on the device under test, with a stand-in for an engine that takes tensors there.

The device is that of ``PLACEMENT_DEVICE``, or the pretended one.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from s2p_deploy.calib import fake_quant_denoiser
from s2p_deploy.engines import TorchRunner
from s2p_deploy.engines.runner import BoundTensorRunner, ClosingRunner
from s2p_deploy.families import denoiser_of, latent_shape_of, load_pipeline, resolve_base, with_components
from s2p_deploy.families.components import LAYERS, component_networks, load_component
from s2p_deploy.pipeline import EnginePipeline, Schedule, auxiliary_components, engine_denoiser, generate
from s2p_deploy.records import Execution, Prompt, ShapeProfile, TensorSpec
from s2p_deploy.records.engine import ComponentEngine
from s2p_deploy.serve.batching import BatchProfile
from s2p_deploy.serve.generation_loop import Observer
from s2p_deploy.serve.generation_task import pausing_pipeline
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.service import ImageService, ModelInfo, ServedEngine, ServiceSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.families.components import ComponentNetwork
    from s2p_deploy.records import CalibratedModel, ComponentEngines

REAL = os.environ.get("PLACEMENT_DEVICE")
if REAL:
    DEVICE = torch.device(REAL)
else:
    from tests.placement.pretended_device import pretended_device

    DEVICE = pretended_device()
PROMPT = Prompt("id", "a small red circle at the top left, white background")
INFO = ModelInfo(
    "shapes", "digest", "stand-in", Execution(), "w4a8", "step", ((2, 1.0),), 3, 3.0, (64, 64), "64x64", ()
)


def device_engine(model: CalibratedModel) -> BoundTensorRunner:
    """Stands in for an engine on the device: the fake-quantized network, behind the same calls as TensorRT's runner."""
    network = fake_quant_denoiser(model).to(DEVICE)
    config = denoiser_config(model)
    inputs = (
        TensorSpec("sample", "float32", ("batch", *latent_shape_of(config))),
        TensorSpec("timestep_index", "int64", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", model.tokens, config["cross_attention_dim"])),
    )
    timesteps = replace(model.timesteps, calibrated=(0.0, 999.0))  # so few samples cover few schedules
    return BoundTensorRunner(TorchRunner(network), inputs, timesteps, profile=ShapeProfile(1, 2, 8))


def denoiser_config(model: CalibratedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model.folder / "denoiser_config.json").read_text(encoding="utf-8"))
    return config


def pipe_of(model: CalibratedModel) -> DiffusionPipeline:
    """Puts a stock pipeline with the stand-in together, as :func:`s2p_deploy.pipeline.open_pipeline` does."""
    base = resolve_base("shapes")
    stock = load_pipeline(base, without={base.family.component})
    runner = device_engine(model)
    denoiser = engine_denoiser(runner, denoiser_config(model), runner.timesteps).place(DEVICE, torch.float32)
    return with_components(stock, {base.family.component: denoiser}).to(DEVICE)


class DeviceNetwork(ClosingRunner):
    """Stands in for the plan of a text encoder or of half of an autoencoder: takes and gives tensors on the device."""

    def __init__(self, component: ComponentNetwork) -> None:
        self.component, self.network = component, component.network.to(DEVICE)

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        raise AssertionError(f"{sorted(inputs)} went through the host")

    @torch.no_grad()
    def infer_tensors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = self.network(inputs[self.component.input])
        return dict(zip(self.component.outputs, made if isinstance(made, tuple) else (made,), strict=True))

    def close(self) -> None: ...


def with_component_engines(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Replaces the other networks of :func:`pipe_of` too, by engines of batches of one."""
    base = resolve_base("shapes")
    loaded = {name: load_component(base, name) for name in component_networks(base)}
    axes = {LAYERS: ("layers", "batch")}  # of outputs; sizes are not looked at
    networks = {
        name: ComponentEngine(
            files=(f"{name}.plan",),
            input=TensorSpec(one.input, "int64" if one.input == "input_ids" else "float32", ("batch", "tokens")),
            outputs=tuple(TensorSpec(output, "float32", axes.get(output, ("batch",))) for output in one.outputs),
            config=one.config,
        )
        for name, one in loaded.items()
    }
    engines = cast("ComponentEngines", SimpleNamespace(networks=networks, profile=ShapeProfile(1, 1, 1)))
    components = auxiliary_components(engines, {name: DeviceNetwork(one) for name, one in loaded.items()})
    for component in components.values():
        component.place(DEVICE, torch.float32)
    return with_components(pipe, components)


def difference_of_shared_batches(pipe: DiffusionPipeline, steps: tuple[int, ...]) -> int:
    """Draws requests of so many steps side by side, and each alone; returns the largest difference of their values."""
    runner = denoiser_of(pipe).runner
    served = ServedEngine(
        INFO,
        EnginePipeline(pipe, runner),
        runner,
        BatchProfile((2, 4, 8), (0.1, 0.1, 0.1)),
        pausing_pipeline(pipe, denoiser_of(pipe).config, runner),
        lambda count, scheduler: count,
        mixed_timesteps=True,
        max_sequence_length=256,
    )
    requests = [ImageRequest(PROMPT.text, count, 3.0, seed=seed, scheduler="ddim") for seed, count in enumerate(steps)]
    with ImageService(served, ServiceSettings(), Observer()) as service:
        futures = [service.submit(request, timeout=600) for request in requests]
        together = [np.asarray(future.result(), np.int16) for future in futures]
    alone = [
        np.asarray(generate(pipe, PROMPT, schedule=Schedule(count, "ddim"), guidance_scale=3.0, seed=seed), np.int16)
        for seed, count in enumerate(steps)
    ]
    return max(int(np.abs(one - other).max()) for one, other in zip(together, alone, strict=True))
