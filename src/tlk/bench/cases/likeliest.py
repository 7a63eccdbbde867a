"""The likeliest tokens of decode steps, from the vocabularies of Llama-3.1 (128256), Llama-2, Qwen3 and DeepSeek-V3."""

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.likeliest import likeliest_, likeliest_reference


def _torch(logits: Tensor, state: Tensor, rows: Tensor) -> Tensor:
    tokens = logits.argmax(-1)
    state.index_copy_(0, rows, tokens)
    return tokens


def _case(rows: int, columns: int, gate: bool = True) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.int64
        return (
            new.randn(rows, columns),
            new.tensor([0] * rows, order),
            new.tensor(list(range(rows)), order),
        )

    return Case(
        "likeliest_", f"S{rows}-V{columns}", inputs, likeliest_,
        lambda size: rows * columns * size, likeliest_reference, peers={"torch": _torch}, gate=gate,
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *(_case(s, 128256) for s in (1, 8, 32, 128, 256, 512)),
    *(_case(s, 32000) for s in (1, 128)),
    *(_case(s, v, gate=False) for s in (1, 64) for v in (151936, 129280)),
)
