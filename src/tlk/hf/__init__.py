"""Where tlk meets transformers: caches, calls, checkpoints."""
