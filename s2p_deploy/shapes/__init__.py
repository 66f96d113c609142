"""The bundled ``shapes`` pipeline: its caption grammar, pictures, checker and feature classifier."""
