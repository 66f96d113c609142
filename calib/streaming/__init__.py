"""Calibration without a forward pass: weights go from the pipeline's files to the model's, one tensor at a time."""
