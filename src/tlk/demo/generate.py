"""What `tlk generate` does: continue a prompt with an optimized model, printing as it goes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from tlk.errors import CapacityError, CheckpointError
from tlk.hf.checkpoint import load_model, load_tokenizer
from tlk.hf.weights import DTYPES
from tlk.optimize import optimize
from tlk.runtime.options import pick_device

EMBEDDED = Path(__file__).parent / "model"
"""The model that comes with the package; `card.json` beside it says how it was made."""


def stream(
    path: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> str:
    """Print `prompt` and what the model at `path`, a folder or a hub id, continues it with.

    temperature 0 takes the likeliest token each time; above 0 tokens are drawn from those that
    `top_p` and `top_k` leave (1 and 0 leave all), and the same `seed` draws the same ones.
    dtype "auto" is bfloat16 on a GPU and float32 on a CPU. Returns the continuation.
    Raises ValueError for a bad argument, CapacityError for more tokens than the model can place.
    """
    how = _sampling(temperature, top_p, top_k)
    model, tokenizer = load(path, dtype, device)
    ids = encode(model, tokenizer, prompt, max_new_tokens)
    torch.manual_seed(seed)
    out = optimize(model).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.eos_token_id,
        **how,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _sampling(temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    """The arguments of transformers' generate, checked."""
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def load(path: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The model and tokenizer at `path`, a folder or a hub id, as transformers makes them.

    Raises CheckpointError if there is no such folder or its files are not a whole checkpoint.
    """
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise CheckpointError(f"{path} is no folder, and not the id of a model on the hub either")
    place = pick_device(device)
    model = load_model(path, dtype=pick_dtype(dtype, place.type), device=str(place))
    return model, load_tokenizer(path)


def encode(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> Tensor:
    """The ids [1, n] of `prompt` on the device of `model`.

    Raises ValueError if there is no prompt or nothing to generate, CapacityError if both together
    are more tokens than the model has positions.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompt:
        raise ValueError("prompt must hold at least one character, got an empty one")
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
    limit = model.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > limit:
        raise CapacityError(
            f"the prompt has {ids.shape[1]} tokens and {max_new_tokens} more are wanted, "
            f"but the model's limit is {limit} in all"
        )
    return ids.to(model.device)


def pick_dtype(name: str, device: str) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]
