"""Steps of the runtime: decode at several batch sizes, and a prompt beside decoding sequences."""

from itertools import accumulate

import torch
from torch import Tensor

from tlk.bench.case import Case, Inputs
from tlk.kernels.step import expand_step, expand_step_reference

PAGE_SIZE = 16


def _run(
    ids: Tensor, cu: Tensor, lens: Tensor, rows: Tensor, tokens: Tensor, table: Tensor,
    ids_out: Tensor, positions: Tensor, slots: Tensor, table_out: Tensor,
) -> None:  # fmt: skip
    inputs = ids, cu, lens, rows, tokens, (table,), PAGE_SIZE
    expand_step(*inputs, ids_out, positions, (slots,), (table_out,))


def _reference(
    ids: Tensor, cu: Tensor, lens: Tensor, rows: Tensor, tokens: Tensor, table: Tensor,
    *out: Tensor,
) -> None:  # fmt: skip
    expand_step_reference(ids, cu, lens, rows, tokens, table, PAGE_SIZE, *out)


def _case(name: str, queries: tuple[int, ...], length: int, capacity: int) -> Case:
    tokens, seqs, pages = sum(queries), len(queries), capacity // PAGE_SIZE

    def inputs(new: Inputs) -> tuple[Tensor, ...]:
        def zeros(n: int) -> Tensor:
            return new.tensor([0] * n, torch.int64)

        return (
            new.tensor([-1 - i for i in range(seqs)] + [7] * (tokens - seqs), torch.int64),
            new.tensor([0, *accumulate(queries)]),
            new.tensor([length] * seqs),
            new.tensor(list(range(seqs))),
            zeros(seqs),
            new.randint(0, 4096, seqs, pages),
            zeros(tokens),
            zeros(tokens),
            zeros(tokens),
            new.randint(0, 1, seqs, pages),
        )

    return Case(
        "expand_step", name, inputs, _run,
        lambda size: 33 * tokens + 8 * seqs * (length // PAGE_SIZE), _reference,
        dtypes=(torch.float32,),
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    _case("decode-B1-S200", (1,), 200, 131072),
    _case("decode-B128-S1024", (1,) * 128, 1024, 2048),
    _case("decode-B256-S2048", (1,) * 256, 2048, 131072),
    _case("mixed-Q7937-and-255", (7937, *(1,) * 255), 8192, 8192),
)
