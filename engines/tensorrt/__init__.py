"""TensorRT and TensorRT-RTX, which share one Python API."""
