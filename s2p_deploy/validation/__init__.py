"""Validation: an engine against the floating-point pipeline it stands for: numbers, pictures, gates, a report."""

from s2p_deploy.validation.compare import Contest, compare
from s2p_deploy.validation.pictures import picture_psnr
from s2p_deploy.validation.validate import Chain, open_chain, validate

__all__ = ["Chain", "Contest", "compare", "open_chain", "picture_psnr", "validate"]
