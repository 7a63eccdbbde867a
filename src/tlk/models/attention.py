"""Attention of a decoder layer over paged keys and values."""

import torch
from torch import Tensor, nn

from tlk import parallel
from tlk.kernels.act_quant import LARGEST
from tlk.kernels.kv_cache import write_kv_
from tlk.kernels.paged_attention import paged_attention
from tlk.models.batch import Batch, LayerKV, PagedKV, Scales
from tlk.models.config import AttentionConfig, NormConfig
from tlk.models.layers import LayerNorm, Linear, RMSNorm, norm, parameter
from tlk.models.rope import RotaryEmbedding
from tlk.quant.format import DENSE, Format


class Attention(nn.Module):
    """q, k and v in one matmul, rotated and cached in place, and the output added to the stream.

    With several ranks, each holds its share of the query and key heads. If `format` is deterministic,
    so is all of it: no row depends on the others, bit for bit.
    """

    sinks: nn.Parameter | None

    def __init__(
        self,
        config: AttentionConfig,
        hidden_size: int,
        rope: RotaryEmbedding | None = None,
        format: Format = DENSE,
    ) -> None:
        super().__init__()
        self.config, self.deterministic = config, format.deterministic
        self.heads = parallel.per_rank("heads", config.heads)
        self.kv_heads = parallel.per_rank("kv_heads", config.kv_heads)
        rows = config.heads * config.head_dim
        rows += config.kv_heads * (config.head_dim + config.v_head_dim)
        self.qkv = Linear(hidden_size, rows, bias=config.bias, format=format, split="out")
        self.out = Linear(
            config.heads * config.v_head_dim,
            hidden_size,
            bias=config.out_bias,
            format=format,
            split="in",
        )
        self.q_norm = _head_norm(config.qk_norm, config.head_dim)
        self.k_norm = _head_norm(config.qk_norm, config.head_dim)
        self.rope = rope
        sinks = parameter(torch.empty(self.heads)) if config.sinks else None
        self.register_parameter("sinks", sinks)
        self.kv_scales: Scales | None = None  # of an 8-bit cache, if `set_kv_scales` left any
        self.kv_dtype: torch.dtype | None = None  # of the cache that they were found for

    def cache_spec(self, dtype: torch.dtype, page_size: int) -> PagedKV:
        """What this layer keeps of every token, on this rank."""
        c = self.config
        return PagedKV(self.kv_heads, c.head_dim, c.v_head_dim, dtype, c.window, page_size)

    def set_kv_scales(
        self,
        k_scale: Tensor | float,
        v_scale: Tensor | float,
        dtype: torch.dtype | None = None,
    ) -> None:
        """What an 8-bit cache divides keys and values by: one number, or one for each kv head.

        The kv heads of the whole model; a rank keeps those of its own. dtype: of the cache they were
        found for; None: whatever it is. Raises ValueError for another count of them, or a scale that
        is not positive and finite.
        """
        every = parallel.world() * self.kv_heads
        mine = []
        for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
            scale = torch.as_tensor(given, dtype=torch.float32, device="cpu").detach().flatten()
            if scale.numel() not in (1, every):
                raise ValueError(f"{name} must be 1 number or {every}, got {scale.numel()}")
            if not (scale.isfinite() & (scale > 0)).all():
                raise ValueError(f"{name} must be positive and finite, got {scale.tolist()}")
            mine.append(scale.expand(every).chunk(parallel.world())[parallel.rank()].clone())
        self.kv_scales, self.kv_dtype = (mine[0], mine[1]), dtype

    def kv_scales_for(self, dtype: torch.dtype) -> Scales | None:
        """The scales of a cache of `dtype`: those that were set, at the range that they were found for."""
        if self.kv_scales is None or self.kv_dtype in (None, dtype):
            return self.kv_scales
        k, v = self.kv_scales
        factor = LARGEST[self.kv_dtype] / LARGEST[dtype]
        return k * factor, v * factor

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm | LayerNorm,
        batch: Batch,
        kv: LayerKV,
        in_place: bool = False,
    ) -> Tensor:
        """`x` [T, hidden] plus attention of norm(x); `in_place`: the sum may be written over `x`."""
        c = self.config
        q, k, v = self._heads(self.qkv(x, norm))
        q = self._cached(q, k, v, batch, kv)
        y = paged_attention(
            q,
            kv.k,
            kv.v,
            batch.page_tables[kv.group],
            batch.seq_lens,
            batch.cu_seqlens_q,
            batch.max_q,
            softmax_scale=c.softmax_scale,
            window=c.window,
            softcap=c.softcap,
            sinks=self.sinks,
            deterministic=self.deterministic,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
        )
        return self.out(y.flatten(1), residual=x, in_place=in_place)

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, kv: LayerKV) -> Tensor:
        """Write the step's keys and values, and return its queries; both normalized and rotated."""
        slots, q_norm, k_norm = batch.slots[kv.group], self.q_norm, self.k_norm
        if self.rope is None:
            if q_norm is not None and k_norm is not None:
                q, k = q_norm(q), k_norm(k)
            write_kv_(k, v, kv.k, kv.v, slots, kv.k_scale, kv.v_scale)
        elif isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
            self.rope(q, k, v, batch.positions, kv, slots, q_norm, k_norm)
        else:
            if q_norm is not None and k_norm is not None:
                q, k = q_norm(q), k_norm(k)
            self.rope(q, k, v, batch.positions, kv, slots)
        return q

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the rows [T, H·D + Hk·D + Hk·Dv] as heads [T, H, D], [T, Hk, D], [T, Hk, Dv]."""
        c = self.config
        widths = [self.heads * c.head_dim, self.kv_heads * c.head_dim]
        q, k, v = qkv.split([*widths, self.kv_heads * c.v_head_dim], dim=-1)
        return (
            q.unflatten(-1, (self.heads, c.head_dim)),
            k.unflatten(-1, (self.kv_heads, c.head_dim)),
            v.unflatten(-1, (self.kv_heads, c.v_head_dim)),
        )


def _head_norm(config: NormConfig | None, head_dim: int) -> RMSNorm | LayerNorm | None:
    return None if config is None else norm(config, head_dim)
