"""The capability probe: small pattern graphs that every backend is asked to build, and where it can, to run."""
