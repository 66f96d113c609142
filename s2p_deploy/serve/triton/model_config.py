"""``config.pbtxt`` of the two models of a repository: the sampling loop, and the denoiser that it calls."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb2

from s2p_deploy.engines.runner import BOUND, OUTPUT
from s2p_deploy.records import TensorSpec
from s2p_deploy.serve.triton.backend import remote_inputs, takes_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.records import Engine
    from s2p_deploy.serve.triton.repository import RepositoryOptions

PLATFORMS = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}  # of Triton's own backends
MODEL_FILES = {"tensorrt": "model.plan", "onnxruntime": "model.onnx"}
_TYPES = {"float32": pb2.TYPE_FP32, "float16": pb2.TYPE_FP16, "int64": pb2.TYPE_INT64, "int32": pb2.TYPE_INT32}
_LOOP_INPUTS = {  # all but the prompt may be left out
    "prompt": pb2.TYPE_STRING,
    "negative_prompt": pb2.TYPE_STRING,
    "steps": pb2.TYPE_INT32,
    "guidance_scale": pb2.TYPE_FP32,
    "seed": pb2.TYPE_INT64,
    "height": pb2.TYPE_INT32,
    "width": pb2.TYPE_INT32,
}


def loop_config(engine: Engine, options: RepositoryOptions, base: str, schedules: Sequence[Sequence[float]]) -> str:
    """Configures the model that clients call: a prompt in, a picture uint8 [H, W, 3] out.

    An instance draws one request at a time. ``base`` is where the floating-point pipeline is; whoever runs the server
    may change it there, its digest is checked. ``schedules`` are timesteps to bind to an engine that takes fractional
    ones.
    """
    parameters = {
        "base": base,
        "denoiser": options.denoiser,
        "most_steps": str(options.most_steps),
        "native": json.dumps(options.native),
        "schedules": json.dumps(schedules),
    }
    config = pb2.ModelConfig(
        name=options.name,
        backend="python",
        max_batch_size=0,
        input=[
            pb2.ModelInput(name=name, data_type=kind, dims=[1], optional=name != "prompt")
            for name, kind in _LOOP_INPUTS.items()
        ],
        output=[pb2.ModelOutput(name="image", data_type=pb2.TYPE_UINT8, dims=[-1, -1, 3])],
        instance_group=[_instances(engine, options.instances)],
        parameters=_parameters(parameters),
    )
    return str(text_format.MessageToString(config))


def denoiser_config(engine: Engine, options: RepositoryOptions, schedules: Sequence[Sequence[float]]) -> str:
    """Configures the model that computes one step. Steps of several requests meet in its queue and run as one batch.

    Not so where all samples of a batch must be of one timestep (lowering ``runtime_q``), and not in Triton's own
    backends where the engine takes the scale table: an input without a batch axis, which their batches cannot have.
    """
    own = tuple(spec for spec in engine.inputs if spec.name != BOUND or takes_table(engine))
    specs = own if options.native else remote_inputs(engine)
    outputs = engine.outputs if options.native else (TensorSpec(OUTPUT, "float32", engine.outputs[0].shape),)
    batched = not options.native or all(spec.name != BOUND for spec in specs)
    joins = batched and engine.mixed_timesteps
    largest = engine.profile.maximum
    meeting = min(2 * options.instances, largest)  # every loop's two samples
    config = pb2.ModelConfig(
        name=options.denoiser,
        max_batch_size=largest if batched else 0,
        input=[pb2.ModelInput(**_tensor(spec, batched=batched)) for spec in specs],
        output=[pb2.ModelOutput(**_tensor(spec, batched=batched)) for spec in outputs],
        instance_group=[_instances(engine, 1)],
    )
    if options.native:
        config.platform = PLATFORMS[engine.backend]
    else:
        config.backend = "python"
        padded = meeting if options.fixed_batch and joins else 0
        for name, value in _parameters({"padded_batch": str(padded), "schedules": json.dumps(schedules)}).items():
            config.parameters[name].CopyFrom(value)
    if joins:  # a batch goes at once when every loop's samples are there, and waits no longer than the delay for them
        config.dynamic_batching.preferred_batch_size.append(meeting)
        config.dynamic_batching.max_queue_delay_microseconds = options.queue_delay
    return str(text_format.MessageToString(config))


def _tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    """Describes a tensor of a model; with ``batched``, Triton adds the first axis itself."""
    dims = [size if isinstance(size, int) else -1 for size in spec.shape]
    fields: dict[str, Any] = {"name": spec.name, "data_type": _TYPES[spec.dtype]}
    if not batched:
        return fields | {"dims": dims}
    if len(dims) == 1:  # Triton wants an axis besides the batch's, the engine has none
        return fields | {"dims": [1], "reshape": pb2.ModelTensorReshape()}
    return fields | {"dims": dims[1:]}


def _instances(engine: Engine, count: int) -> pb2.ModelInstanceGroup:
    on_gpu = engine.environment.get("device") == "CUDA GPU"
    group = pb2.ModelInstanceGroup
    return group(count=count, kind=group.KIND_GPU if on_gpu else group.KIND_CPU)


def _parameters(values: dict[str, str]) -> dict[str, pb2.ModelParameter]:
    return {name: pb2.ModelParameter(string_value=value) for name, value in values.items()}
