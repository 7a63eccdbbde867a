"""`verify`: both paths on the same inputs, and how far apart they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlk.errors import UnsupportedError
from tlk.hf.checkpoint import load
from tlk.hf.execution import Optimized
from tlk.hf.quant_linear import QuantLinear


@dataclass(frozen=True, slots=True)
class Verification:
    """Differences of tlk's logits from the original's, over all positions.

    max_logit_error: the largest absolute difference; relative_error: ‖difference‖ / ‖original‖;
    kl: mean KL divergence from the original's distribution, in nats; top1_agreement: the share of
    positions where both name the same most likely token. quantized: the original is the model before it
    was quantized. perplexity, original_perplexity: of the prompts' own next tokens; NaN without any.
    """

    max_logit_error: float
    relative_error: float
    kl: float
    top1_agreement: float
    positions: int
    quantized: bool = False
    perplexity: float = math.nan
    original_perplexity: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dictionary, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        text = (
            f"{self.positions} positions: max logit error {self.max_logit_error:.3g}, relative error "
            f"{self.relative_error:.3g}, KL {self.kl:.3g} nats, top-1 agreement {self.top1_agreement:.2%}"
        )
        if not self.quantized:
            return text
        change = self.perplexity / self.original_perplexity - 1
        return (
            f"{text}\nperplexity {self.perplexity:.4g}, {self.original_perplexity:.4g} before "
            f"quantization ({change:+.2%})"
        )


def verify(model: nn.Module, prompts: Sequence[Tensor] | None = None) -> Verification:
    """Compare an optimized model with its original forward.

    The original is transformers' forward on the same weights. Of a model that `optimize` quantized it is
    the model of the checkpoint it came from, which is read again.
    prompts: token ids [n] each; without them, 4 random sequences of 64 tokens from a fixed seed, whose
    perplexity says nothing. Raises ValueError if `model` is not optimized, or its forward does not run
    on tlk; UnsupportedError if the checkpoint of a quantized model is not on this machine.
    """
    if not isinstance(model, Optimized):
        raise ValueError("model must be optimized by tlk, this one runs as transformers wrote it")
    if model.training:
        raise ValueError("model must be in eval mode: in training mode the original forward runs")
    if prompts is None:
        prompts = _random_prompts(model)
    if not prompts:
        raise ValueError("prompts must hold at least one sequence, got none")
    original = _before_quantization(model)
    device = next(model.parameters()).device
    errors = [_compare(model, original, ids.to(device)[None]) for ids in prompts]
    total = torch.stack(errors).sum(0)
    worst = max(float(e[0]) for e in errors)
    n, following = int(total[5]), float(total[8])
    ours, theirs = (math.exp(t / following) if following else math.nan for t in total[6:8])
    return Verification(
        max_logit_error=worst,
        relative_error=float((total[1] / total[2]).sqrt()),
        kl=float(total[3] / n),
        top1_agreement=float(total[4] / n),
        positions=n,
        quantized=original is not None,
        perplexity=ours,
        original_perplexity=theirs,
    )


def _before_quantization(model: Any) -> nn.Module | None:
    """The model that was quantized, from its checkpoint; None if nothing was, or the checkpoint itself is."""
    quantized = any(isinstance(m, QuantLinear) for m in model.modules())
    if not quantized or "_tlk_stored" in model.__dict__:
        return None
    path = Path(getattr(model, "name_or_path", "") or "")
    if not path.name or not path.is_dir():
        raise UnsupportedError(
            "verify compares a quantized model with the checkpoint it came from, and name_or_path "
            f"{str(path)!r} is no folder on this machine"
        )
    some = next(model.parameters())
    original, _ = load(model._tlk_base, path, dtype=some.dtype)
    return original.to(some.device).eval()


def _random_prompts(model: Any) -> list[Tensor]:
    seed = torch.Generator().manual_seed(0)
    longest = min(64, getattr(model.config, "max_position_embeddings", 64))
    return list(torch.randint(0, model.config.vocab_size, (4, longest), generator=seed))


@torch.no_grad()
def _compare(model: Any, original: Any, ids: Tensor) -> Tensor:
    """[max error, Σ difference², Σ original², Σ KL, agreeing positions, positions, Σ −log p of the next
    tokens by the model and by the original, how many these are], float64.
    """
    before = model._execution.forwards["tlk"]
    ours = model(input_ids=ids, use_cache=False, return_dict=True).logits.double()
    if model._execution.forwards["tlk"] == before:
        reasons = "; ".join(model._execution.reasons)
        raise ValueError(f"model does not run on tlk: {reasons}")
    how = {"input_ids": ids, "use_cache": False, "return_dict": True}
    theirs = model._tlk_base.forward(model, **how) if original is None else original(**how)
    theirs = theirs.logits.double()
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    values = (
        (ours - theirs).abs().max(),
        (ours - theirs).square().sum(),
        theirs.square().sum(),
        (p.exp() * (p - q)).sum(),
        (ours.argmax(-1) == theirs.argmax(-1)).sum(),
        torch.tensor(ids.numel(), device=ids.device),
        *(F.nll_loss(log[0, :-1], ids[0, 1:], reduction="sum") for log in (q, p)),
        torch.tensor(ids.numel() - 1, device=ids.device),
    )
    return torch.stack([v.double() for v in values]).cpu()
