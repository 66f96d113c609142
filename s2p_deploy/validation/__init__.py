"""Validation: an engine against its floating-point pipeline, in numbers, pictures and a verdict."""
