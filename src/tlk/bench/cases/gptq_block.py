"""Blocks of 128 columns of the linears of Llama-3.1-8B: down and out, qkv, gate and up."""

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.gptq_block import BLOCK, Grid, gptq_block, gptq_block_reference


def _case(n: int, grid: Grid) -> Case:
    def inputs(new: Inputs) -> tuple[Tensor | None, ...]:
        u, scale = new.randn(BLOCK, BLOCK), new.randn(n, BLOCK)
        if not new.empty:
            u, scale = u.mul_(0.05).fill_diagonal_(1.0), scale.fill_(0.3)
        zero = torch.full_like(scale, 8.0) if grid == "int" else None
        return new.randn(n, BLOCK), u, scale, zero

    def run(w: Tensor, u: Tensor, scale: Tensor, zero: Tensor | None) -> object:
        return gptq_block(w, u, scale, zero, grid=grid)

    def reference(w: Tensor, u: Tensor, scale: Tensor, zero: Tensor | None) -> object:
        return gptq_block_reference(w, u, scale, zero, grid, 15)

    return Case(
        "gptq_block", f"N{n}-{grid}", inputs, run, lambda size: n * BLOCK * (4 * size + 1),
        reference, flops=n * BLOCK * BLOCK, peers={"torch": reference}, dtypes=(torch.float32,),
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *(_case(n, "int") for n in (4096, 6144, 28672)),
    _case(4096, "e2m1"),
)
