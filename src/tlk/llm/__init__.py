"""Text in, text out: `LLM` for lists of prompts, `AsyncLLM` for many tasks at once."""

from tlk.llm.async_llm import AsyncLLM
from tlk.llm.llm import LLM
from tlk.llm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
]
