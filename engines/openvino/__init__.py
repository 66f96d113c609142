"""OpenVINO on the CPU: the fast embedded engine, with real INT8."""

from s2p_deploy.engines.openvino.backend import OpenVinoBackend


def backend(name: str) -> OpenVinoBackend:
    """The backend of this folder."""
    return OpenVinoBackend(name)
