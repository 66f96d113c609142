"""ONNX Runtime: on the CPU the reference for parity, and execution providers for NVIDIA GPUs."""
