"""Passes that derive a backend's graph from the canonical one: one transformation, one file, one test."""
