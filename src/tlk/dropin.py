"""Drop-in replacements of transformers' classes: the same constructors, optimized from the start.

    model = tlk.LlamaForCausalLM.from_pretrained(path, dtype="bfloat16", device_map="cuda")

Each is a real subclass of the transformers class of the same name. Loading is strict: safetensors
only, and a missing, left-over or misshapen key is a CheckpointError.
"""

from typing import Any

import transformers
from torch import nn

from tlk.hf.checkpoint import load
from tlk.hf.execution import Optimized
from tlk.hf.quantized_model import is_quantized, load_quantized
from tlk.optimize import optimize
from tlk.quant.config import QuantConfig


def _optimized(
    kind: Any,
    path: Any,
    *args: Any,
    quantization: str | QuantConfig | None = None,
    calibration: Any = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """What `kind.from_pretrained` loads, strictly, and optimized."""
    model, info = load(kind, path, *args, **kwargs)
    optimize(model, quantization=quantization, calibration=calibration)
    return (model, info) if output_loading_info else model


def _around_decoder(
    kind: Any,
    path: Any,
    *,
    quantization: str | QuantConfig | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """The quantized checkpoint at `path` as a model of class `kind`, optimized."""
    if quantization is not None:
        raise ValueError(f"{path} is quantized already: quantization must be None for it")
    model = optimize(load_quantized(kind, path, **kwargs))
    info: dict[str, set[str]] = {"missing_keys": set(), "unexpected_keys": set()}
    return (model, info) if output_loading_info else model


class _DropIn(Optimized):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base: Any = next(c for c in cls.__mro__ if not issubclass(c, Optimized))
        cls._tlk_base = base
        cls._tlk_pickles_as = cls  # type: ignore[assignment]

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' from_pretrained, with its arguments; returns an optimized model.

        quantization and calibration are as in `tlk.optimize`. A quantized checkpoint is read by tlk, in
        any of the formats that it knows, with the arguments dtype and device_map. Raises CheckpointError for a corrupt, truncated, pickled or mismatching
        checkpoint.
        """
        if not args and is_quantized(path):
            return _around_decoder(cls, path, **kwargs)
        return _optimized(super(), path, *args, **kwargs)


class LlamaForCausalLM(_DropIn, transformers.LlamaForCausalLM):
    """transformers.LlamaForCausalLM on tlk's kernels."""


class MistralForCausalLM(_DropIn, transformers.MistralForCausalLM):
    """transformers.MistralForCausalLM on tlk's kernels."""


class Qwen2ForCausalLM(_DropIn, transformers.Qwen2ForCausalLM):
    """transformers.Qwen2ForCausalLM on tlk's kernels."""


class Qwen3ForCausalLM(_DropIn, transformers.Qwen3ForCausalLM):
    """transformers.Qwen3ForCausalLM on tlk's kernels."""


class NemotronForCausalLM(_DropIn, transformers.NemotronForCausalLM):
    """transformers.NemotronForCausalLM on tlk's kernels."""


class AutoModelForCausalLM:
    """Any causal language model of transformers, optimized where tlk knows the family."""

    def __init__(self) -> None:
        raise TypeError("use AutoModelForCausalLM.from_pretrained(path) or .from_config(config)")

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' from_pretrained, with its arguments, and quantization and calibration as in
        `tlk.optimize`; loading is strict as above.
        """
        if not args and is_quantized(path):
            return _around_decoder(transformers.AutoModelForCausalLM, path, **kwargs)
        return _optimized(transformers.AutoModelForCausalLM, path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> nn.Module:
        """As transformers' from_config: random weights; in eval mode, so that tlk runs it."""
        return optimize(transformers.AutoModelForCausalLM.from_config(config, **kwargs).eval())
