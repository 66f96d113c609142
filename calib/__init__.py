"""Calibration: prompts in, a CalibratedModel out."""
