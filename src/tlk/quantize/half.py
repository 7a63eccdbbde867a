"""A decoder layer in two halves, attention and MLP, each a norm and two linear layers.

    x → norm → first → inner → second → + x

first is q, k and v or gate and up, second is out or down, and inner is what lies between: attention, or
the gated activation. A calibrator needs what each of them reads: norm(x), and what inner gives.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tlk.models.batch import Batch, KVCache, LayerKV
from tlk.models.decoder import DecoderLayer
from tlk.models.layers import LayerNorm, Linear, RMSNorm
from tlk.models.mlp import GatedMLP
from tlk.quant.format import Packed

PAGE = 16


@dataclass(frozen=True, slots=True)
class Half:
    """`run(x [T, hidden], sequences)` adds the half to the residual stream.

    absorbs: the rows of `first` whose scale passes through inner unchanged into the inputs of `second`,
    in the same order; None where it does not. `names` are those of first and second in the layer.
    """

    norm: RMSNorm | LayerNorm
    first: Linear
    second: Linear
    names: tuple[str, str]
    absorbs: slice | None
    run: Callable[[Tensor, int], Tensor]

    def inner(self, x: Tensor, sequences: int) -> Tensor:
        """What `second` reads where the residual stream is `x` [T, hidden]."""
        seen: list[Tensor] = []
        with reading(self.second, seen.append):
            self.run(x, sequences)
        return seen[0]


def halves(layer: DecoderLayer, runner: "Attending") -> tuple[Half, Half]:
    """The attention and the MLP of `layer`, whose attention runs as `runner` has it."""
    a, m = layer.attention, layer.mlp
    k_rows = a.heads * a.config.head_dim + a.kv_heads * a.config.head_dim
    v_rows = slice(k_rows, k_rows + a.kv_heads * a.config.v_head_dim)
    attention = Half(
        layer.input_norm, a.qkv, a.out, ("attention.qkv", "attention.out"),
        v_rows if a.kv_heads == a.heads else None,
        lambda x, n: a(x, layer.input_norm, runner.batch(x, n), runner.kv(layer, x, n)),
    )  # fmt: skip
    if isinstance(m, GatedMLP):
        first, name = m.gate_up, "mlp.gate_up"
        up: slice | None = slice(first.out_features // 2, first.out_features)
    else:
        first, name, up = m.up, "mlp.up", None
    mlp = Half(
        layer.post_norm, first, m.down, (name, "mlp.down"), up, lambda x, n: m(x, layer.post_norm)
    )
    return attention, mlp


class Attending:
    """Batches and a cache of keys and values for sequences of one length, all starting anew.

    The cache of the last layer that ran is left in `last`; it holds zeros where there is no token.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self.length, self.device = length, device
        self.last: LayerKV | None = None
        self._batches: dict[int, Batch] = {}
        self._caches: dict[Any, LayerKV] = {}

    def batch(self, x: Tensor, sequences: int) -> Batch:
        """A step of `sequences` whole sequences."""
        if sequences not in self._batches:
            pages = -(-self.length // PAGE)
            table = torch.arange(sequences * pages, dtype=torch.int32, device=self.device)
            place = torch.arange(self.length, device=self.device)
            first = torch.arange(sequences, device=self.device)[:, None] * pages * PAGE
            ends = torch.arange(sequences + 1, dtype=torch.int32, device=self.device) * self.length
            self._batches[sequences] = Batch(
                positions=place.repeat(sequences),
                slots=((first + place).flatten(),),
                cu_seqlens_q=ends,
                seq_lens=torch.full_like(ends[1:], self.length),
                page_tables=(table.view(sequences, pages),),
                max_q=self.length,
            )
        return self._batches[sequences]

    def kv(self, layer: DecoderLayer, x: Tensor, sequences: int) -> LayerKV:
        """Pages for them, of what `layer` keeps."""
        spec = layer.attention.cache_spec(x.dtype, PAGE)
        key = (replace(spec, window=0), sequences)
        if key not in self._caches:
            pages = sequences * -(-self.length // PAGE)
            (self._caches[key],) = KVCache.allocate([spec], [pages], self.device).layers
            self._caches[key].k.zero_()
            self._caches[key].v.zero_()
        self.last = self._caches[key]
        return self.last


class _Reader:
    """In place of a linear layer's format: hands its inputs over and multiplies nothing."""

    def __init__(self, read: Callable[[Tensor], object]) -> None:
        self.read = read

    def rounds(self, x: Tensor, packed: Packed) -> bool:
        """False: what is read is what an unquantized layer would multiply."""
        return False

    def linear(
        self, x: Tensor, packed: Packed, *, residual: Tensor | None = None, **options: Any
    ) -> Tensor | None:
        self.read(x)
        return residual


@contextmanager
def reading(linear: Linear, read: Callable[[Tensor], object]) -> Iterator[None]:
    """Inside the block `linear` gives what it reads to `read`, and its residual as its result."""
    format = linear.format
    linear.format = cast(Any, _Reader(read))
    try:
        yield
    finally:
        linear.format = format
