"""Engines: an ExportedGraph in, an Engine and its Runner out, per backend."""
