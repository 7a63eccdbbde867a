"""The embedded model behind an LLM, small enough for a test."""

from tlk.demo.generate import EMBEDDED

SMALL = {
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "kv_cache_memory": 16 << 20,
}


def make(kind, **options):
    """An LLM or AsyncLLM on the embedded model."""
    return kind(str(EMBEDDED), **{**SMALL, **options})
