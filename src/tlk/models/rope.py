"""Rotary positions: tables of cosines and sines, equal to transformers' for every kind.

    angle(p, i) = p · inv_freq(i)        inv_freq(i) = theta^(-2i / rotary_dim), then per kind:

linear   divides by a factor. https://arxiv.org/abs/2306.15595
dynamic  raises theta with the longest sequence seen (NTK).
llama3   divides low frequencies by a factor, high ones not, and blends between.
yarn     the same with a ramp over dimensions, and scales cos and sin. https://arxiv.org/abs/2309.00071
longrope one factor per frequency, one list for short and one for long sequences, and scales cos
         and sin. https://arxiv.org/abs/2402.13753

The tables are float32 [L, rotary_dim / 2]: transformers rounds cos and sin to the model's dtype
before it multiplies, the kernel rounds once, after. Row p serves every token at position p, so a
forward computes no cosine. 128 Ki positions of 64 frequencies take 64 MiB.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tlk.kernels.rope import rope_and_write_kv_
from tlk.models.batch import LayerKV
from tlk.models.config import RopeConfig, RopeKind
from tlk.models.layers import RMSNorm


class RotaryEmbedding(nn.Module):
    """The tables of one `RopeConfig`; layers with equal configs share one.

    They start empty: `prepare` must cover the positions of a forward before it runs. The tables
    keep their address until they grow.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        self.config = config
        self._frequencies = _FREQUENCIES[config.kind]
        self._chosen: int | None = None  # the length that decided the frequencies in the tables
        width = (config.rotary_dim + 1) // 2
        self.register_buffer("cos", torch.empty(0, width, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(0, width, dtype=torch.float32), persistent=False)

    def prepare(self, length: int, device: torch.device | None = None) -> None:
        """Cover positions below `length`, the longest sequence of the coming forward.

        `dynamic` and `longrope` choose their frequencies by that length, as transformers does at
        each forward. `device` is where the tables go; None: where they are.
        """
        device = device or self.cos.device
        chosen = _deciding_length(self.config, length, self._chosen)
        rows = self.cos.shape[0]
        if length > rows or device != self.cos.device:
            rows = max(length, 2 * rows)
            with torch.inference_mode(False):  # its tensors could not be refilled outside of it
                self.cos = torch.empty(rows, self.cos.shape[1], dtype=torch.float32, device=device)
                self.sin = torch.empty_like(self.cos)
        elif chosen == self._chosen:
            return
        self._chosen = chosen
        self._fill(chosen)

    def _fill(self, chosen: int) -> None:
        inv_freq, scale = self._frequencies(self.config, chosen)
        positions = torch.arange(self.cos.shape[0], device=self.cos.device, dtype=torch.float32)
        angles = positions[:, None] * inv_freq.to(self.cos.device)
        self.cos.copy_(angles.cos().mul_(scale))
        self.sin.copy_(angles.sin().mul_(scale))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:  # model.to(bfloat16): the tables only change device
            self.cos = torch.empty_like(self.cos, dtype=torch.float32)
            self.sin = torch.empty_like(self.cos)
            if self._chosen is not None:
                self._fill(self._chosen)
        return self

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, kv: LayerKV, slots: Tensor,
        q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None,
    ) -> None:  # fmt: skip
        """Rotate `q` [T, H, D] in place by `positions` [T]; write rotated `k` and `v` to `slots`.

        `q_norm` and `k_norm`, of one eps and offset, are applied to every head first.
        """
        write = partial(
            rope_and_write_kv_, q, k, v, self.cos, self.sin, positions, kv.k, kv.v, slots,
            interleaved=self.config.interleaved, k_scale=kv.k_scale, v_scale=kv.v_scale,
        )  # fmt: skip
        if q_norm is None or k_norm is None:
            return write()
        eps, offset = q_norm.eps, q_norm.weight_offset
        write(q_norm=q_norm.weight, k_norm=k_norm.weight, eps=eps, weight_offset=offset)


def _deciding_length(config: RopeConfig, length: int, previous: int | None) -> int:
    """The sequence length that decides the frequencies; one number for kinds that do not care."""
    trained = config.max_position_embeddings
    if config.kind == "longrope":
        return original_length(config) + (length > original_length(config))
    if config.kind != "dynamic":
        return trained
    if length < trained:
        return trained
    return max(length, previous or trained)


def original_length(config: RopeConfig) -> int:
    """Positions the model was trained on before it was extended."""
    return config.original_max_position_embeddings or config.max_position_embeddings


def _factor(config: RopeConfig) -> float:
    if config.factor is not None:
        return config.factor
    return config.max_position_embeddings / original_length(config)


def _exponents(config: RopeConfig) -> Tensor:
    return torch.arange(0, config.rotary_dim, 2, device="cpu").float() / config.rotary_dim


def _default(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    return 1.0 / config.theta ** _exponents(config), 1.0


def _linear(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    return _default(config, length)[0] / _factor(config), 1.0


def _dynamic(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    trained, dim = config.max_position_embeddings, config.rotary_dim
    if length == trained:
        return _default(config, length)
    # in float32, as transformers computes it from a tensor of positions
    stretch = _factor(config) * torch.tensor(length, device="cpu") / trained - (_factor(config) - 1)
    theta = config.theta * stretch ** (dim / (dim - 2))
    return 1.0 / theta ** _exponents(config), 1.0


def _llama3(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    inv_freq, _ = _default(config, length)
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    original = original_length(config)
    keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / _factor(config) + keep * inv_freq, 1.0


def _yarn(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    dim = config.rotary_dim

    def dimension(rotations: float) -> float:  # which turns `rotations` times over the original
        turns = original_length(config) / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    keep = 1 - ((torch.arange(dim // 2, device="cpu").float() - low) / width).clamp(0, 1)
    powers = config.theta ** _exponents(config)
    inv_freq = 1.0 / (_factor(config) * powers) * (1 - keep) + 1.0 / powers * keep
    return inv_freq, _yarn_scale(config)


def _yarn_scale(config: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        factor = _factor(config)
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)


def _longrope(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    original = original_length(config)
    factors = config.long_factor if length > original else config.short_factor
    inv_freq = 1.0 / (torch.tensor(factors, device="cpu") * config.theta ** _exponents(config))
    scale = config.attention_factor
    if scale is None:
        factor = _factor(config)
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return inv_freq, scale


_FREQUENCIES: dict[RopeKind, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
