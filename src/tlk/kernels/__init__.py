"""Fused GPU operations on plain tensors. Knows torch and triton, and nothing else of tlk."""
