"""Lowerings: how a timestep-dependent scale becomes ONNX, one file per form."""
