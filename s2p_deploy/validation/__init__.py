"""Validation: an engine against the floating-point pipeline it stands for: numbers, pictures, gates, a report."""

from s2p_deploy.metric_networks import MetricWeights, open_weights
from s2p_deploy.validation.chain import Chain, open_chain
from s2p_deploy.validation.compare import ComparedRecipe, compare
from s2p_deploy.validation.gates import junit_xml
from s2p_deploy.validation.pictures import picture_psnr
from s2p_deploy.validation.recheck import Judgement, gates_from, recheck, write_rechecked
from s2p_deploy.validation.validate import validate

__all__ = [
    "Chain",
    "ComparedRecipe",
    "Judgement",
    "MetricWeights",
    "compare",
    "gates_from",
    "junit_xml",
    "open_chain",
    "open_weights",
    "picture_psnr",
    "recheck",
    "validate",
    "write_rechecked",
]
