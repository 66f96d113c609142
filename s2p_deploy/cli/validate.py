def validate() -> int:
    """Stub."""
    return 0
