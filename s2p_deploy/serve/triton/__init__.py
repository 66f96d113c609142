"""NVIDIA Triton: a model repository of an engine, and what runs inside its Python backend."""
