"""`verify`: both paths on the same weights and inputs, and how far apart they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlk.hf.execution import Optimized


@dataclass(frozen=True, slots=True)
class Verification:
    """Differences of tlk's logits from those of transformers' own forward, over all positions.

    max_logit_error: the largest absolute difference; relative_error: ‖difference‖ / ‖original‖;
    kl: mean KL divergence from the original's distribution, in nats; top1_agreement: the share of
    positions where both name the same most likely token.
    """

    max_logit_error: float
    relative_error: float
    kl: float
    top1_agreement: float
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dictionary, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        return (
            f"{self.positions} positions: max logit error {self.max_logit_error:.3g}, relative error "
            f"{self.relative_error:.3g}, KL {self.kl:.3g} nats, top-1 agreement {self.top1_agreement:.2%}"
        )


def verify(model: nn.Module, prompts: Sequence[Tensor] | None = None) -> Verification:
    """Compare an optimized model with its original forward.

    prompts: token ids [n] each; without them, 4 random sequences of 64 tokens from a fixed seed.
    Raises ValueError if `model` is not optimized, or its forward does not run on tlk.
    """
    if not isinstance(model, Optimized):
        raise ValueError("model must be optimized by tlk, this one runs as transformers wrote it")
    if model.training:
        raise ValueError("model must be in eval mode: in training mode the original forward runs")
    if prompts is None:
        prompts = _random_prompts(model)
    if not prompts:
        raise ValueError("prompts must hold at least one sequence, got none")
    device = next(model.parameters()).device
    errors = [_compare(model, ids.to(device)[None]) for ids in prompts]
    total = torch.stack(errors).sum(0)
    worst = max(float(e[0]) for e in errors)
    n = int(total[5])
    return Verification(
        max_logit_error=worst,
        relative_error=float((total[1] / total[2]).sqrt()),
        kl=float(total[3] / n),
        top1_agreement=float(total[4] / n),
        positions=n,
    )


def _random_prompts(model: Any) -> list[Tensor]:
    seed = torch.Generator().manual_seed(0)
    longest = min(64, getattr(model.config, "max_position_embeddings", 64))
    return list(torch.randint(0, model.config.vocab_size, (4, longest), generator=seed))


@torch.no_grad()
def _compare(model: Any, ids: Tensor) -> Tensor:
    """[max error, Σ difference², Σ original², Σ KL, agreeing positions, positions], float64."""
    before = model._execution.forwards["tlk"]
    ours = model(input_ids=ids, use_cache=False, return_dict=True).logits.double()
    if model._execution.forwards["tlk"] == before:
        reasons = "; ".join(model._execution.reasons)
        raise ValueError(f"model does not run on tlk: {reasons}")
    original = model._tlk_base.forward(model, input_ids=ids, use_cache=False, return_dict=True)
    theirs = original.logits.double()
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    values = (
        (ours - theirs).abs().max(),
        (ours - theirs).square().sum(),
        theirs.square().sum(),
        (p.exp() * (p - q)).sum(),
        (ours.argmax(-1) == theirs.argmax(-1)).sum(),
        torch.tensor(ids.numel(), device=ids.device),
    )
    return torch.stack([v.double() for v in values]).cpu()
