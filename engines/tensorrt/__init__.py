"""TensorRT 10/11 and TensorRT-RTX: one Python API, two libraries, chosen by the backend's name."""

from s2p_deploy.engines.tensorrt.backend import TensorRtBackend


def backend(name: str) -> TensorRtBackend:
    """The backend of a name: ``tensorrt`` or ``tensorrt_rtx``."""
    return TensorRtBackend(name)
