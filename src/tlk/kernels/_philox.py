"""Gumbel noise that depends on a request's seed and offset and on the token, and on nothing else.

    g[v] = -log(-log(1 - u[v])),   u[v] = (word + 1/2) / 2^32

The word is one of the four that Philox4x32-10 makes of a 128-bit counter and a 64-bit key (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the seed, the counter is
(block of tokens, 0, offset, offset >> 32); token v uses word v // QUARTER % 4 of the block
v // (4 QUARTER) · QUARTER + v % QUARTER: all four words are used, and the tokens of one word are
neighbours in memory. Where other things are numbered, such as lanes, or tokens in a second draw, the
counter is (number, stream, offset, offset >> 32), of which the first word counts. Kernel and reference make the same u; their logarithms differ by about 3e-6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

QUARTER = 2048


def philox_reference(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 of four counter words and two key words, each an int64 tensor of 32-bit values."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (high0, low0), (high2, low2) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, by halves so that int64 does not overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def gumbel_reference(seeds: Tensor, offsets: Tensor, n_cols: int) -> Tensor:
    """The noise g [S, V] float32 of requests with `seeds` [S] at `offsets` [S]."""
    blocks, width = triton.cdiv(n_cols, 4 * QUARTER), min(n_cols, QUARTER)
    place = torch.arange(width, device=seeds.device)
    place = (torch.arange(blocks, device=seeds.device)[:, None] * QUARTER + place).flatten()
    words = _words(seeds, offsets, place.expand(len(seeds), -1), 0)
    bits = torch.stack([w.view(len(seeds), blocks, width) for w in words], 2)
    u = bits.flatten(1)[:, :n_cols].float() * 2.0**-32 + 2.0**-33
    u = u.clamp(max=1 - 2.0**-24)
    return _gumbel(u)


def numbered_gumbel_reference(
    seeds: Tensor, offsets: Tensor, numbers: Tensor, stream: int
) -> Tensor:
    """Noise float32 of `numbers` [S, n] in one of many streams apart from that of `gumbel_reference`."""
    word = _words(seeds, offsets, numbers, stream)[0]
    return _gumbel((word.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24))


def _words(seeds: Tensor, offsets: Tensor, numbers: Tensor, stream: int) -> list[Tensor]:
    """The four words of `numbers` [S, n] for requests with `seeds` [S] at `offsets` [S]."""
    zero = torch.zeros_like(numbers, dtype=torch.int64)
    seed, offset = seeds[:, None], offsets[:, None]
    counter = [zero + numbers, zero + stream, zero + (offset & 0xFFFFFFFF)]
    counter.append(zero + (offset >> 32 & 0xFFFFFFFF))
    return philox_reference(counter, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])


def _gumbel(u: Tensor) -> Tensor:
    return -torch.where(u < 0.0625, _series(u), -torch.log(1 - u)).log()


def _series(u: Tensor) -> Tensor:
    """-log(1 - u) where float32 would lose u: large noise, which wins draws, comes from small u."""
    return u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u / 6)))))


@triton.jit
def philox(block, seed, offset):
    """The four words, uint32 as `block`, of blocks of tokens."""
    return _philox(block, 0, seed, offset)


@triton.jit
def _philox(block, stream, seed, offset):
    zero = block * 0
    low = (offset & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.philox(seed, block, zero + stream, zero + low, zero + (offset >> 32).to(tl.int32))


@triton.jit
def numbered_gumbel(numbers, stream, seed, offset):
    """The noise of `numbers` in stream `stream`, which is above 0."""
    word, _, _, _ = _philox(numbers, stream, seed, offset)
    return gumbel(word)


@triton.jit
def gumbel(word):
    # fast_logf is six instructions where log is twenty; both are exact enough from 1/16 on
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u = tl.minimum(u, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * (0.2 + u * 0.16666667)))))
    return -libdevice.fast_logf(tl.where(u < 0.0625, series, -libdevice.fast_logf(1.0 - u)))
