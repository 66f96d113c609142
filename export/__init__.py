"""Export: a CalibratedModel in, one QDQ ONNX graph (an ExportedGraph) out."""
