"""Codes in streams of 32-bit words, as GPTQ, AWQ and compressed-tensors write them.

Element e of a stream occupies its bits e·b to e·b + b - 1, and word w holds the stream's bits 32w to
32w + 31, lowest first. So a word of 4-bit codes has element i in bits 4i to 4i + 3, and 3-bit codes
cross words. Bytes and words are little-endian, as safetensors has them.
"""

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, uint8 [R, count], of each row of int32 `words` [R, C]; `bits` 1 to 8."""
    if bits in (1, 2, 4, 8):
        octets = words.contiguous().view(torch.uint8)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = (octets[..., None] >> shifts) & (2**bits - 1)
        return codes.flatten(1)[:, :count]
    first = torch.arange(count, device=words.device) * bits
    word, shift = first // 32, first % 32
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    both = unsigned[:, word] | (unsigned[:, word + 1] << 32)
    return ((both >> shift) & (2**bits - 1)).to(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """`codes` [R, count] of any integer dtype as int32 words [R, ceil(count · bits / 32)]."""
    rows, count = codes.shape
    if bits in (4, 8):
        codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % (32 // bits)))
        octets = codes if bits == 8 else pair_low_first(codes)
        return octets.contiguous().view(torch.int32)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.to(torch.uint8)[..., None] >> shifts) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -count * bits % 32))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    octets = (stream.view(rows, -1, 8) * weights).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)


def word_count(count: int, bits: int) -> int:
    """Words of 32 bits that `count` codes take."""
    return -(-count * bits // 32)


def low_first(octets: Tensor) -> Tensor:
    """4-bit codes, uint8 [R, 2C], of bytes [R, C] with the first of each pair in the low half."""
    return torch.stack([octets & 15, octets >> 4], -1).flatten(1)


def high_first(octets: Tensor) -> Tensor:
    """4-bit codes, uint8 [R, 2C], of bytes [R, C] with the first of each pair in the high half."""
    return torch.stack([octets >> 4, octets & 15], -1).flatten(1)


def pair_low_first(codes: Tensor) -> Tensor:
    """Undo `low_first`: codes [R, 2C] to bytes [R, C]."""
    first, second = codes.to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return first | (second << 4)


def pair_high_first(codes: Tensor) -> Tensor:
    """Undo `high_first`: codes [R, 2C] to bytes [R, C]."""
    first, second = codes.to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return (first << 4) | second
