"""Triton kernels and a PyTorch-native runtime for fast inference of Hugging Face models."""

from tlk._version import __version__ as __version__
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
    EngineError,
    FallbackWarning,
    TlkError,
    UnsupportedError,
)
from tlk.hf.quantizer import register_quantizers
from tlk.llm import (
    LLM,
    AsyncLLM,
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from tlk.optimize import Report, optimize, report, restore
from tlk.quant.config import QuantConfig
from tlk.quantize.checkpoint import quantize
from tlk.runtime.params import SamplingParams
from tlk.verify import Verification, verify

__all__ = [
    "LLM",
    "AsyncLLM",
    "AutoModelForCausalLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "EngineError",
    "FallbackWarning",
    "LlamaForCausalLM",
    "Logprob",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "QuantConfig",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Report",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "TlkError",
    "UnsupportedError",
    "Verification",
    "optimize",
    "quantize",
    "register_quantizers",
    "report",
    "restore",
    "verify",
]
