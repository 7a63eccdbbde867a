"""AWQ's checkpoints of version "gemm", as AutoAWQ writes them: 4 bit with zero points.

    w[n, k] = (q[k, n] - z[g, n]) · scales[g, n]         g = k // group_size

qweight int32 [K, N/8] and qzeros int32 [g, N/8] are packed along N in the order 0 2 4 6 1 3 5 7: nibble i
of a word holds column order[i] of its eight. Zero points are stored as they are. The smoothing is
already folded into the layers before. Lin et al., "AWQ", https://arxiv.org/abs/2306.00978
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.files._bits import pack_words, unpack_words
from tlk.quant.files.layer import Layer, Tensors, group_count, integers

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
NIBBLE_OF = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where column i of eight lies: the inverse of ORDER."""


@dataclass(frozen=True)
class AWQ:
    """What quantization_config says.

    group_size None: one group of all inputs. skipped: parts of names of modules that stay in 16 bit.
    """

    group_size: int | None = 128
    skipped: tuple[str, ...] = ()

    method = "awq"

    def listed(self, module: str) -> bool | None:
        if module == "lm_head":
            return False
        return not any(part in module for part in self.skipped)

    def named(self) -> Collection[str]:
        return ()

    def holds(self, suffixes: Collection[str]) -> bool:
        return "qweight" in suffixes

    def read(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Layer:
        n, k = shape
        t = Tensors(module, tensors)
        if n % 8:
            raise CheckpointError(f"{module} has {n} outputs: AWQ packs eight into a word")
        qweight = t.take("qweight", torch.int32, k, n // 8)
        scales = t.scale("scales", None, n)
        groups = scales.shape[0]
        expected = group_count(module, k, self.group_size)
        if groups != expected:
            raise CheckpointError(
                f"{module}.scales must have {expected} groups of {self.group_size} inputs, got {groups}"
            )
        qzeros = t.take("qzeros", torch.int32, groups, n // 8)
        t.done()
        return integers(module, _columns(qweight).T, scales.T, _columns(qzeros).T, 4)


def scheme(fields: Mapping[str, Any]) -> AWQ:
    """The scheme of a quantization config; UnsupportedError for what tlk does not read."""
    bits = fields.get("bits", fields.get("w_bit", 4))
    version = str(fields.get("version") or fields.get("format") or "gemm").lower()
    backend = fields.get("backend", "autoawq")
    if bits != 4 or version != "gemm" or backend == "llm-awq":
        raise UnsupportedError(
            f"awq with bits {bits}, version {version!r}, backend {backend!r}: "
            "tlk reads 4 bits of version 'gemm' as AutoAWQ writes them"
        )
    if not fields.get("zero_point", True):
        raise UnsupportedError(
            "awq without zero points (zero_point false) is no layout that tlk reads"
        )
    group_size = fields.get("group_size", fields.get("q_group_size", 128))
    return AWQ(
        None if group_size in (None, -1) else int(group_size),
        tuple(fields.get("modules_to_not_convert") or ()),
    )


def _columns(words: Tensor) -> Tensor:
    """The codes, uint8 [R, N], of `words` [R, N/8]."""
    codes = unpack_words(words, 4, words.shape[1] * 8)
    return codes.unflatten(1, (-1, 8))[..., NIBBLE_OF].flatten(1)


def write(codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """The tensors, by suffix, of `codes` uint8 [N, K] with scale and zero [N, g]; 8 divides N."""
    return {
        "qweight": _words(codes.T),
        "qzeros": _words(zero.T),
        "scales": scale.T.to(torch.float16).contiguous(),
    }


def _words(codes: Tensor) -> Tensor:
    return pack_words(codes.unflatten(1, (-1, 8))[..., ORDER].flatten(1), 4)
