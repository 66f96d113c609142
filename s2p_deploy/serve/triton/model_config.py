"""``config.pbtxt`` of the two models of a repository: the sampling loop, and the denoiser that it asks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.bound_scales import BOUND
from s2p_deploy.engines.lowerings import MIXED_ROWS
from s2p_deploy.engines.options import ShapeProfile
from s2p_deploy.engines.runner import ADDED_COND, OUTPUT, PROJECTIONS, TEXT, TEXT_PROJECTIONS
from s2p_deploy.records import TensorSpec
from s2p_deploy.serve.triton.text_format import Word, text_format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.records import Engine
    from s2p_deploy.serve.triton.options import RepositoryOptions

PLATFORMS = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}  # of Triton's own backends
MODEL_FILES = {"tensorrt": "model.plan", "onnxruntime": "model.onnx"}
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}
_ASKED = {  # input of the loop -> its type; all but the prompt may be left out
    "prompt": "TYPE_STRING",
    "negative_prompt": "TYPE_STRING",
    "steps": "TYPE_INT32",
    "guidance_scale": "TYPE_FP32",
    "seed": "TYPE_INT64",
    "height": "TYPE_INT32",
    "width": "TYPE_INT32",
}


def loop_config(engine: Engine, options: RepositoryOptions, base: str, schedules: Sequence[Sequence[float]]) -> str:
    """Of the model that clients ask: a prompt in, a picture uint8 [H, W, 3] out, one request at a time per instance.

    ``base`` is where the floating-point pipeline is; whoever runs the server may change it there, its digest is
    checked. ``schedules`` are timesteps to bind to an engine that takes fractional ones.
    """
    inputs: list[dict[str, Any]] = [
        {"name": name, "data_type": Word(kind), "dims": [1]} | ({} if name == "prompt" else {"optional": True})
        for name, kind in _ASKED.items()
    ]
    parameters = {
        "base": base,
        "denoiser": options.denoiser,
        "most_steps": str(options.most_steps),
        "native": json.dumps(options.native),
        "schedules": json.dumps(schedules),
    }
    return text_format(
        {
            "name": options.name,
            "backend": "python",
            "max_batch_size": 0,
            "input": inputs,
            "output": [{"name": "image", "data_type": Word("TYPE_UINT8"), "dims": [-1, -1, 3]}],
            "instance_group": [{"count": options.instances, "kind": _device_kind(engine)}],
            "parameters": _parameters(parameters),
        }
    )


def denoiser_config(engine: Engine, options: RepositoryOptions, schedules: Sequence[Sequence[float]]) -> str:
    """Of the model that computes one step. Steps of several requests meet in its queue and run as one batch.

    Not so where all samples of a batch must be of one timestep (lowering ``runtime_q``), and not in Triton's own
    backends where the engine takes the scale table: an input without a batch axis, which their batches cannot have.
    """
    specs = _native_inputs(engine) if options.native else remote_inputs(engine)
    outputs = engine.outputs if options.native else (TensorSpec(OUTPUT, "float32", engine.outputs[0].shape),)
    batched = not options.native or all(spec.name != BOUND for spec in specs)
    joins = batched and engine.manifest.content.get(MIXED_ROWS, True)
    largest = ShapeProfile.from_json(engine.manifest.content["profile"]).maximum
    meeting = min(2 * options.instances, largest)  # every loop's two samples
    padded = meeting if options.fixed_batch and joins else 0
    parameters = {"padded_batch": str(padded), "schedules": json.dumps(schedules)}
    kind: dict[str, Any] = {"platform": PLATFORMS[engine.backend]} if options.native else {"backend": "python"}
    return text_format(
        {"name": options.denoiser}
        | kind
        | {
            "max_batch_size": largest if batched else 0,
            "input": [_tensor(spec, batched=batched) for spec in specs],
            "output": [_tensor(spec, batched=batched) for spec in outputs],
            "instance_group": [{"count": 1, "kind": _device_kind(engine)}],
        }
        | ({"dynamic_batching": _batching(meeting, options.queue_delay)} if joins else {})
        | ({} if options.native else {"parameters": _parameters(parameters)})
    )


def remote_inputs(engine: Engine) -> tuple[TensorSpec, ...]:
    """What the denoiser's Python model takes per step: what PyTorch's denoiser would, every float as float32."""
    stands_for = {PROJECTIONS, TEXT_PROJECTIONS, TEXT, BOUND}
    own = [TensorSpec(s.name, _plain(s.dtype), s.shape) for s in engine.inputs if s.name not in stands_for]
    text = TensorSpec(TEXT, "float32", ("batch", *_text_shape(engine)))
    added = [TensorSpec(ADDED_COND, "float32", ("batch", engine.added_width))] if engine.added_width else []
    return (*own, text, *added)


def takes_table(engine: Engine) -> bool:
    """Whether the engine's file has the scale table among its inputs; one without act points has none to read."""
    return bool(engine.scales.points) and any(spec.name == BOUND for spec in engine.inputs)


def _native_inputs(engine: Engine) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in engine.inputs if spec.name != BOUND or takes_table(engine))


def _text_shape(engine: Engine) -> tuple[int, int]:
    """Tokens and width of the text states; -1 for a width that only the graph of the text's products knows."""
    for spec in engine.inputs:
        if spec.name == TEXT:
            return int(spec.shape[1]), int(spec.shape[2])
    products = next(spec for spec in engine.inputs if spec.name == TEXT_PROJECTIONS)
    return int(products.shape[1]), -1


def _plain(dtype: str) -> str:
    return "float32" if dtype.startswith("float") else dtype


def _tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    """A tensor of a model; with ``batched``, Triton adds the first axis itself."""
    dims = [size if isinstance(size, int) else -1 for size in spec.shape]
    entry: dict[str, Any] = {"name": spec.name, "data_type": Word(_TYPES[spec.dtype])}
    if not batched:
        return entry | {"dims": dims}
    if len(dims) == 1:  # Triton wants an axis besides the batch's, the engine has none
        return entry | {"dims": [1], "reshape": {"shape": []}}
    return entry | {"dims": dims[1:]}


def _batching(meeting: int, delay: int) -> dict[str, Any]:
    """Goes at once when every loop's samples are there, and waits no longer than the delay for them."""
    return {"preferred_batch_size": [meeting], "max_queue_delay_microseconds": delay}


def _device_kind(engine: Engine) -> Word:
    return Word("KIND_GPU" if engine.environment.get("device") == "CUDA GPU" else "KIND_CPU")


def _parameters(values: dict[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]
