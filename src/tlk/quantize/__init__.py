"""Quantize a model: from what a user asks for, through calibration, to a checkpoint of a standard format."""
