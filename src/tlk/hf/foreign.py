"""Quantized models that transformers loaded, with the modules of other packages made tlk's own.

`AutoModelForCausalLM.from_pretrained` gives a quantized checkpoint's linear layers to the package of its
method: bitsandbytes' Linear4bit, compressed-tensors' patched Linear, FP8Linear. Their tensors have the names
that they have in files, so they are read as files are, and the modules become `QuantLinear`s. After
`register_quantizers` they are that from the start.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.hub import QUANTIZATION, read_config, read_quantization
from tlk.hf.quant_linear import quantized_like
from tlk.hf.quantizer import is_ours
from tlk.quant.files.layer import Layer, Scheme
from tlk.quant.files.recognise import method_of, recognise

READ = ("compressed-tensors", "bitsandbytes", "fp8", "fbgemm_fp8")
"""Methods whose modules keep their tensors as the file has them."""
HOW = "call tlk.register_quantizers() before from_pretrained, or load it with tlk.AutoModelForCausalLM"
"""So that tlk reads the files."""
FLAGS = (
    "hf_quantizer", "is_quantized", "quantization_method", "quantization_config", "is_loaded_in_4bit",
    "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable",
)  # fmt: skip
"""What transformers notes on a model that it loaded quantized: it refuses to move one, among others."""


def foreign_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers of `model` that transformers gave to another package, by name.

    Empty if tlk read them itself. Raises UnsupportedError for a method whose modules change their
    tensors (GPTQ, AWQ), and CheckpointError for one that transformers does not know (ModelOpt), so that
    the codes became weights: with `register_quantizers` tlk reads such files itself.
    """
    fields = quantization_of(model)
    if fields is None or is_ours(model):
        return {}
    scheme = recognise(fields)
    found = {name: m for name, m in model.named_modules() if _quantized(m, scheme)}
    if found and scheme.method not in READ:
        raise UnsupportedError(
            f"the modules of a {scheme.method} model are not as its file is: {HOW}"
        )
    return found


@torch.no_grad()
def take_over(model: nn.Module) -> list[str]:
    """Make `QuantLinear`s of the `foreign_layers` of `model`; returns their names.

    One layer at a time is in memory twice. Raises as `foreign_layers` does, before anything has changed.
    """
    found, fields = foreign_layers(model), quantization_of(model)
    if fields is not None and is_ours(model):
        _forget(model, fields)
    if fields is None or not found:
        return []
    scheme, dtype = recognise(fields), _activations(model)
    for name, module in found.items():
        tensors = {k: t.detach() for k, t in module.state_dict().items() if k != "bias"}
        format, packed = _read(scheme, name, module, tensors)
        model.set_submodule(name, quantized_like(module, format, packed, dtype))
    _forget(model, fields)
    return list(found)


def quantization_of(model: Any) -> dict[str, Any] | None:
    """How the checkpoint that transformers loaded into `model` was quantized; None: it was not.

    CheckpointError if transformers does not know the method, or does not look where old files say it:
    it takes the codes for weights then.
    """
    fields = getattr(getattr(model, "config", None), "quantization_config", None)
    if fields is None and (fields := _said_elsewhere(model)) is None:
        return None
    fields = dict(fields) if isinstance(fields, dict) else dict(fields.to_dict())
    if getattr(model, "hf_quantizer", None) is None:
        raise CheckpointError(
            f"its files say that the weights are quantized with {method_of(fields)}, and transformers "
            f"loaded them as if they were not: {HOW}"
        )
    return fields


def _said_elsewhere(model: Any) -> dict[str, Any] | None:
    """What lies beside the config.json of a model from a folder, if only that says it is quantized."""
    folder = Path(getattr(model, "name_or_path", "") or "")
    if "_tlk_stored" in model.__dict__ or not folder.name or not (folder / "config.json").is_file():
        return None
    config = read_config(folder)
    if any(config.get(name) for name in QUANTIZATION):
        return None  # transformers knew, and the user has had it dequantized
    fields = read_quantization(folder, config)
    algorithm = (fields or {}).get("quantization", {"quant_algo": ""}).get("quant_algo")
    return fields if algorithm is not None else None  # ModelOpt: the cache alone


def _quantized(module: nn.Module, scheme: Scheme) -> bool:
    leaf = not any(True for _ in module.children())
    return leaf and hasattr(module, "in_features") and scheme.holds(set(module.state_dict()))


def _activations(model: nn.Module) -> torch.dtype:
    """The dtype of what is not quantized: norms and embeddings."""
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    found = {m.weight.dtype for m in model.modules() if isinstance(m, nn.Embedding)} & set(kinds)
    if len(found) != 1:
        raise UnsupportedError(f"the embeddings of the model must be of one dtype, got {found}")
    return found.pop()


def _read(scheme: Scheme, name: str, module: Any, tensors: dict[str, torch.Tensor]) -> Layer:
    shape = (module.out_features, module.in_features)
    try:
        return scheme.read(name, tensors, shape)
    except CheckpointError as error:
        raise UnsupportedError(f"{name} is not as transformers loads it: {error}") from error


def _forget(model: Any, fields: dict[str, Any]) -> None:
    """Let the model be one that nobody quantized, as far as transformers can tell."""
    if (hook := model.__dict__.pop("ct_decompress_hook", None)) is not None:
        hook.remove()
    for flag in FLAGS:
        model.__dict__.pop(flag, None)
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__["_tlk_stored"] = {"quantization_config": fields}
