"""Baselines, ablations and comparisons around s2p_deploy."""
