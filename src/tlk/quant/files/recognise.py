"""Which tool quantized a checkpoint, from what its config says. What tlk does not know is an error."""

from collections.abc import Callable, Mapping
from typing import Any

from tlk.errors import UnsupportedError
from tlk.quant.files import awq, bitsandbytes, compressed_tensors, deepseek, gptq, modelopt
from tlk.quant.files.layer import Scheme

METHODS: Mapping[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "gptq": gptq.scheme,
    "awq": awq.scheme,
    "compressed-tensors": compressed_tensors.scheme,
    "fp8": deepseek.scheme,
    "fbgemm_fp8": deepseek.fbgemm_scheme,
    "bitsandbytes": bitsandbytes.scheme,
    "modelopt": modelopt.scheme,
}


def recognise(fields: Mapping[str, Any]) -> Scheme:
    """The scheme of a config.json's quantization_config, of quantize_config.json or of hf_quant_config.json.

    Raises UnsupportedError naming the method, or what of it, that tlk does not read.
    """
    method = method_of(fields)
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise UnsupportedError(
            f"the checkpoint is quantized with {method}, which tlk does not read; it reads {known}"
        )
    return METHODS[method](fields)


def method_of(fields: Mapping[str, Any]) -> str:
    """The name of the method; of old files, which have none, by the fields they have."""
    if name := fields.get("quant_method") or fields.get("quant_type"):
        name = str(getattr(name, "value", name)).lower()
        return "modelopt" if name.startswith("modelopt_") else name  # vLLM's name for its NVFP4
    if "quantization" in fields or "quant_algo" in fields:
        return "modelopt"
    if "w_bit" in fields or "zero_point" in fields:
        return "awq"
    if "bits" in fields:
        return "gptq"
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "bitsandbytes"
    return "a method that it does not name"
