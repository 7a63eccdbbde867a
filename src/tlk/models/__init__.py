"""Modules of tlk and the model families assembled from them."""
