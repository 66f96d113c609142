"""The small pipelines of the other families, as they lie among the tests' assets."""

from __future__ import annotations

from pathlib import Path

from s2p_deploy.families import BasePipeline, resolve_base

PIPELINES = Path(__file__).parent / "assets" / "pipelines"


def sibling(name: str) -> BasePipeline:
    """``sd2``, ``sdxl`` or ``sd3``: 8x8x4 latents, the bundled pipeline's autoencoder and tokenizer."""
    return resolve_base(str(PIPELINES / f"shapes-{name}"))
