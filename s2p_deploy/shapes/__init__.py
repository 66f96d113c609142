"""The bundled ``shapes`` pipeline: its scenes, checker and feature classifier."""
