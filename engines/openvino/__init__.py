"""OpenVINO: the fast CPU backend."""
