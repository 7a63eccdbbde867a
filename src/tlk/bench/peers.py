"""transformers on the same weights: what a user has without tlk, measured beside it.

`generate` as it comes (SDPA), its static cache with torch.compile, and `generate_batch`, its own
continuous batching, whose manager is kept after a first call so that its start is not counted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tlk.bench.ceilings import seconds
from tlk.errors import UnsupportedError


def random_model(
    fields: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int
) -> nn.Module:
    """A model of transformers with random weights, made on `device`; no token ends its text."""
    kept = {k: v for k, v in fields.items() if k != "model_type"}
    nothing = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(fields["model_type"], **(kept | nothing))
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def generation_config(new_tokens: int) -> GenerationConfig:
    """Greedy, and nothing ends the text but its length."""
    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], new: int, repeats: int, static: bool = False
) -> dict[str, float]:
    """Seconds of `model.generate` on one batch of prompts of equal length.

    static: with transformers' static cache, which compiles the forward; a GPU only.
    """
    if static and model.device.type != "cuda":
        raise UnsupportedError("transformers compiles its static cache on a GPU only")
    ids = torch.tensor(prompts, device=model.device)
    how = {"cache_implementation": "static"} if static else {}

    def run() -> None:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **how,
        )
        check_counts([out.shape[1] - ids.shape[1]], new)

    return seconds(run, repeats, model.device)


def generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], new: int, repeats: int = 1
) -> dict[str, float]:
    """Seconds of `model.generate_batch` on all prompts, its manager started and warmed up."""
    inputs = [list(p) for p in prompts]
    before = model.config._attn_implementation

    def run() -> None:
        out = model.generate_batch(
            inputs, generation_config=generation_config(new), persistent_manager=True
        )
        if len(out) != len(inputs):
            raise RuntimeError(f"generate_batch finished {len(out)} of {len(inputs)} requests")
        check_counts([len(o.generated_tokens) for o in out.values()], new)

    try:
        return seconds(run, repeats, model.device)
    finally:
        model.destroy_cached_continuous_batching_manager()
        model.set_attn_implementation(before)


def check_counts(counts: Sequence[int], expected: int) -> None:
    """A peer that stopped early would look fast."""
    if set(counts) != {expected}:
        raise RuntimeError(f"{expected} tokens were wanted of each, the peer gave {set(counts)}")


def compare(
    runs: dict[str, Callable[[], dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """The figures of each peer by name; the reason where one cannot run here."""
    figures: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        try:
            figures[name] = run()
        except (UnsupportedError, RuntimeError, ImportError, ValueError) as error:
            figures[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return figures
