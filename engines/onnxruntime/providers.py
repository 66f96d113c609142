"""ONNX Runtime's execution providers for NVIDIA GPUs: which can be used here, their options, and a session on one.

TensorRT's compile the graph when a session opens and keep the result in the user's private cache folder, apart for
every engine: their own names for it depend on the graph, not on its weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.engines.machine import has_nvidia_driver, private_folder
from s2p_deploy.engines.options import profile_shapes
from s2p_deploy.errors import MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnxruntime

    from s2p_deploy.engines.options import Shapes
    from s2p_deploy.records import ShapeProfile, TensorSpec

_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_SWAP = "pip uninstall onnxruntime, then pip install"  # both packages own the same folder


@dataclass(frozen=True)
class Provider:
    """An execution provider by ONNX Runtime's name, and what to install for it."""

    name: str
    advice: str


PROVIDERS = {
    "cuda": Provider("CUDAExecutionProvider", f"{_SWAP} 's2p-deploy[gpu]'"),
    "tensorrt": Provider("TensorrtExecutionProvider", f"{_SWAP} 's2p-deploy[gpu,tensorrt]'"),
    "nv_tensorrt_rtx": Provider("NvTensorRTRTXExecutionProvider", "pip install onnxruntime-ep-nv-tensorrt-rtx"),
}


@dataclass(frozen=True)
class GraphTraits:
    """Properties of a graph that a provider's options depend on.

    The shapes of the inputs, whether it is in fp16, whether it has quantized activations, and a digest of everything
    that it is made of, weights included.
    """

    shapes: Shapes
    fp16: bool
    quantized: bool
    digest: str


def unavailable() -> dict[str, str]:
    """Providers that cannot be used here, and what to do about it."""
    import onnxruntime

    built_in = set(onnxruntime.get_available_providers())
    advice: dict[str, str] = {}
    for key, provider in PROVIDERS.items():
        plugged = key == "nv_tensorrt_rtx" and importlib.util.find_spec(_RTX_PLUGIN) is not None
        if provider.name not in built_in and not plugged:
            advice[key] = provider.advice
        elif not has_nvidia_driver():
            advice[key] = "it needs an NVIDIA GPU and its driver"
    return advice


def graph_traits(inputs: Iterable[TensorSpec], profile: ShapeProfile, *, quantized: bool, digest: str) -> GraphTraits:
    """Collects the traits of a graph with the given inputs. Raises InputError where a size that must not vary does."""
    specs = tuple(inputs)
    timesteps = next((spec.shape[0] for spec in specs if spec.name == "act_scales"), 1)
    tuned = timesteps if isinstance(timesteps, int) else 1000  # the training timesteps
    fp16 = any(spec.dtype == "float16" for spec in specs)
    return GraphTraits(profile_shapes(specs, profile, tuned), fp16, quantized, digest)


def provider_options(provider: str, gpu: int, traits: GraphTraits | None = None, cache: str = "") -> dict[str, str]:
    """Options of a provider on the GPU of that index; ``cache`` is the folder for what it compiles of a known graph.

    No calibration: the graph quantizes explicitly, the INT8 flag only allows integer kernels. Weights stay outside of
    the model that TensorRT's parser is given, which may have no more than 2 GB.
    """
    device = {"device_id": str(gpu)}
    if provider == "cuda":
        return device | {"use_tf32": "0"}  # TF32 would round products behind the graph's back
    large = {"nv_use_external_data_initializer" if provider == "nv_tensorrt_rtx" else "trt_load_user_initializer": "1"}
    if traits is None:
        return device | large
    shapes = {
        f"profile_{kind}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, three[at]))}" for name, three in traits.shapes.items()
        )
        for at, kind in enumerate(("min", "opt", "max"))
    }
    if provider == "nv_tensorrt_rtx":
        own = {"enable_cuda_graph": "1", "nv_runtime_cache_path": cache}
        return device | large | own | {f"nv_{name}": value for name, value in shapes.items()}
    precisions = {
        "trt_fp16_enable": str(int(traits.fp16)),
        "trt_int8_enable": str(int(traits.quantized)),
    }
    caches = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
    }
    return device | large | precisions | caches | {f"trt_{name}": value for name, value in shapes.items()}


def gpu_session(
    model: str | bytes,
    options: onnxruntime.SessionOptions,
    name: str,
    traits: GraphTraits | None = None,
    gpu: int = 0,
) -> onnxruntime.InferenceSession:
    """Opens a session on a provider, on the GPU of that index; without ``traits`` it keeps nothing that it compiles.

    Raises:
        MissingEnvironmentError: the provider cannot be used: ONNX Runtime would go on with the CPU.
    """
    import onnxruntime

    onnxruntime.preload_dlls()  # CUDA's libraries, where they came as Python packages
    provider, cache = PROVIDERS[name].name, ""
    if traits is not None:
        folder = private_folder(f"onnxruntime-{name}") / traits.digest
        folder.mkdir(mode=0o700, exist_ok=True)
        cache = str(folder)
    chosen = provider_options(name, gpu, traits, cache)
    if provider in onnxruntime.get_available_providers():
        providers = [(provider, chosen)]
        if name == "tensorrt":  # for what TensorRT leaves out
            providers.append((PROVIDERS["cuda"].name, provider_options("cuda", gpu)))
        session = onnxruntime.InferenceSession(model, options, providers=[*providers, "CPUExecutionProvider"])
    else:
        provider = _plug_in(options, chosen)
        session = onnxruntime.InferenceSession(model, options)
    if session.get_providers()[0] != provider:
        raise MissingEnvironmentError(f"ONNX Runtime could not start {provider} and would run on the CPU: see its log")
    return session


def _plug_in(options: onnxruntime.SessionOptions, chosen: Mapping[str, str]) -> str:
    """Adds the TensorRT-RTX plugin, on the GPU that is chosen, to a session's options; returns the plugin's name."""
    import onnxruntime

    plugin = importlib.import_module(_RTX_PLUGIN)
    name: str = plugin.get_ep_name()
    if not any(device.ep_name == name for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    # the plugin says of each of its devices which of CUDA's it is
    gpu = chosen["device_id"]
    usable = [device for at, device in enumerate(found) if device.ep_options.get("device_id", str(at)) == gpu]
    if not usable:
        raise MissingEnvironmentError(f"{name} does not run on GPU {gpu}: it needs an RTX 30 series or later")
    options.add_provider_for_devices(usable[:1], dict(chosen))
    return name
