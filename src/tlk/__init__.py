"""Triton kernels and a PyTorch-native runtime for fast inference of Hugging Face models."""

from tlk.dropin import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    NemotronForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from tlk.errors import (
    CapacityError,
    CheckpointError,
    FallbackWarning,
    TlkError,
    UnsupportedError,
)
from tlk.optimize import Report, optimize, report, restore
from tlk.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AutoModelForCausalLM",
    "CapacityError",
    "CheckpointError",
    "FallbackWarning",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Report",
    "TlkError",
    "UnsupportedError",
    "Verification",
    "optimize",
    "report",
    "restore",
    "verify",
]
