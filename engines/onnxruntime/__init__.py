"""ONNX Runtime: on the CPU the reference for parity, and execution providers for NVIDIA GPUs."""

from s2p_deploy.engines.onnxruntime.backend import OnnxRuntimeBackend


def backend(name: str) -> OnnxRuntimeBackend:
    """The backend of this folder."""
    return OnnxRuntimeBackend(name)
