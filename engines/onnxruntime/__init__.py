"""ONNX Runtime: the reference backend of every parity check."""
