"""TensorRT 10/11 and TensorRT-RTX: one Python API, two libraries, chosen by the backend's name."""
