"""Triton kernels and a PyTorch-native runtime for fast inference of Hugging Face models."""

__version__ = "0.1.0"
