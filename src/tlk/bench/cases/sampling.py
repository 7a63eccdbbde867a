"""Sampling from the vocabularies of Llama-3.1 (128256), Llama-2, Qwen3 and DeepSeek-V3, in the settings that take different paths."""

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.sampling import (
    apply_penalties_,
    apply_penalties_reference,
    sample,
    sample_reference,
    top_logprobs,
    top_logprobs_reference,
)

VOCABULARY = 128256
SETTINGS = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "k50-p0.9": (1.0, 50, 0.9, 0.0),
    "p0.9": (1.0, 0, 0.9, 0.0),
    "min-p0.05": (1.0, 0, 1.0, 0.05),
}


def _torch_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a sampler of torch ops does: sort once, mask, draw; seeds are not per request."""
    x = logits.float() / temperature[:, None].clamp(min=1e-6)
    ordered, ids = x.sort(-1, descending=True)
    k = torch.where(top_k > 0, top_k, x.shape[1])[:, None]
    ordered = ordered.masked_fill(torch.arange(x.shape[1], device=x.device) >= k, -torch.inf)
    p = ordered.softmax(-1)
    keep = (p.cumsum(-1) - p < top_p[:, None]) & (p >= min_p[:, None] * p[:, :1])
    noise = torch.empty_like(p).exponential_()
    drawn = (p.where(keep, 0.0) / noise).argmax(-1, keepdim=True)
    tokens = ids.gather(-1, drawn)
    return tokens[:, 0], logits.float().log_softmax(-1).gather(-1, tokens)[:, 0]


def _sample_case(rows: int, columns: int, name: str, gate: bool = True) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        t, k, p, m = SETTINGS[name]
        return (
            new.randn(rows, columns),
            new.tensor([t] * rows, torch.float32),
            new.tensor([k] * rows),
            new.tensor([p] * rows, torch.float32),
            new.tensor([m] * rows, torch.float32),
            new.tensor(list(range(rows)), torch.int64),
            new.tensor([7] * rows, torch.int64),
        )

    return Case(
        "sample", f"S{rows}-V{columns}-{name}", inputs, sample,
        lambda size: rows * columns * size, sample_reference, peers={"torch": _torch_sample},
        options=dict(zip(("temperature", "top_k", "top_p", "min_p"), SETTINGS[name], strict=True)),
        gate=gate, gathers=("_sample_kernel",),
    )  # fmt: skip


def _torch_penalties(
    logits: Tensor, prompt_mask: Tensor, output_counts: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor,
) -> None:  # fmt: skip
    output = output_counts > 0
    scale = torch.where(prompt_mask | output, repetition[:, None], 1.0)
    logits.copy_(torch.where(logits > 0, logits / scale, logits * scale))
    logits -= frequency[:, None] * output_counts
    logits -= presence[:, None] * output


def _penalties_case(rows: int, gate: bool = True) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        return (
            new.randn(rows, VOCABULARY, dtype=torch.float32),
            new.randint(0, 2, rows, VOCABULARY, dtype=torch.bool),
            new.randint(0, 3, rows, VOCABULARY),
            new.tensor([1.1] * rows, torch.float32),
            new.tensor([0.5] * rows, torch.float32),
            new.tensor([0.1] * rows, torch.float32),
        )

    return Case(
        "apply_penalties_", f"S{rows}-V{VOCABULARY}", inputs, apply_penalties_,
        lambda size: 13 * rows * VOCABULARY, apply_penalties_reference,
        peers={"torch": _torch_penalties}, dtypes=(torch.float32,), gate=gate,
    )  # fmt: skip


def _torch_top(logits: Tensor, tokens: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(n)
    return logprobs.gather(-1, tokens[:, None])[:, 0], ids, values


def _top_case(rows: int, n: int, gate: bool = True) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, Tensor, int]:
        return new.randn(rows, VOCABULARY), new.tensor(list(range(rows)), torch.int64), n

    return Case(
        "top_logprobs", f"S{rows}-V{VOCABULARY}-n{n}", inputs, top_logprobs,
        lambda size: rows * VOCABULARY * size, top_logprobs_reference, peers={"torch": _torch_top},
        gate=gate, gathers=("_top_logprobs_kernel",),
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    # all numbers of rows and all settings launch the same kernels
    *(_sample_case(s, VOCABULARY, "k50-p0.9", gate=s == 1) for s in (1, 32, 128, 512)),
    *(_sample_case(s, VOCABULARY, "p0.9", gate=False) for s in (1, 32, 128, 512)),
    *(
        _sample_case(s, VOCABULARY, name, gate=False)
        for name in ("greedy", "plain", "min-p0.05")
        for s in (1, 128)
    ),
    *(_sample_case(16, v, "k50-p0.9", gate=v in (500, 4000)) for v in (128, 500, 4000, 32000)),
    *(_sample_case(s, v, "k50-p0.9", gate=False) for s in (1, 64) for v in (151936, 129280)),
    *(_penalties_case(s, gate=s == 1) for s in (1, 128)),
    *(_top_case(s, n, gate=s == 1) for s in (1, 128) for n in (1, 20)),
)
