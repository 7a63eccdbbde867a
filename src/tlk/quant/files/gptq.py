"""GPTQ's checkpoints, as AutoGPTQ and GPTQModel write them: 2, 3, 4 and 8 bit, both versions of zeros.

    w[n, k] = (q[k, n] - z[g, n]) · scales[g, n]         g = g_idx[k], else k // group_size

qweight int32 [K·b/32, N] holds the codes of a column along K, qzeros int32 [g, N·b/32] the zero points
along N, both lowest first. Version 1 (checkpoint_format "gptq", the default) stores z - 1: a version 2
word minus a one in each of its fields, borrows and all, so that it must be undone by word.
Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.files._bits import pack_words, unpack_words, word_count
from tlk.quant.files.layer import Layer, Tensors, group_count, integers
from tlk.quant.format import Packed

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A word with a one in each field."""
BITS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class GPTQ:
    """What quantization_config, or quantize_config.json, says.

    group_size None: one group of all inputs. version: of the zero points, 1 or 2. dynamic: GPTQModel's
    overrides by regular expression, None where one leaves modules out. inside: the only modules of a
    block that are quantized, by the ends of their names; none: the files say which.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    version: int = 1
    lm_head: bool = False
    dynamic: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
    inside: tuple[str, ...] = ()

    method = "gptq"

    def listed(self, module: str) -> bool | None:
        if module == "lm_head":
            return None if self.lm_head else False
        if self.of(module) is None:
            return False
        return any(module.endswith(f".{name}") for name in self.inside) if self.inside else None

    def named(self) -> Collection[str]:
        return ()

    def holds(self, suffixes: Collection[str]) -> bool:
        return "qweight" in suffixes

    def of(self, module: str) -> "GPTQ | None":
        """What holds for `module`, after the first override that names it; None: not quantized."""
        for pattern, changes in self.dynamic:
            if re.match(pattern, module):
                return None if changes is None else _changed(self, changes)
        return self

    def read(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Layer:
        own = self.of(module) or self
        n, k = shape
        t, bits = Tensors(module, tensors), own.bits
        qweight = t.take("qweight", torch.int32, word_count(k, bits), n)
        scales = t.scale("scales", None, n)
        groups = scales.shape[0]
        expected = group_count(module, k, own.group_size)
        if groups != expected:
            raise CheckpointError(
                f"{module}.scales must have {expected} groups of {own.group_size} inputs, got {groups}"
            )
        qzeros = t.take("qzeros", torch.int32, groups, word_count(n, bits))
        g_idx = t.take("g_idx", (torch.int32, torch.int64), k) if t.has("g_idx") else None
        t.done()
        codes = unpack_words(qweight.T, bits, k)
        zero = None if own.symmetric else zeros(qzeros, bits, n, own.version).T
        perm = None if g_idx is None else order_of_groups(module, g_idx, groups)
        if perm is not None:
            codes = codes[:, perm[0]]
        return integers(module, codes, scales.T, zero, bits, perm)


def scheme(fields: Mapping[str, Any]) -> GPTQ:
    """The scheme of a quantization config; UnsupportedError for what tlk does not read."""
    name = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    if name not in FORMATS or fields.get("is_marlin_format"):
        raise UnsupportedError(
            f"gptq checkpoint_format {name!r} is of one kernel; tlk reads {', '.join(FORMATS)}"
        )
    if fields.get("pack_dtype") not in (None, "int32"):
        raise UnsupportedError(f"gptq pack_dtype {fields['pack_dtype']!r}: tlk reads int32")
    base = GPTQ(
        version=FORMATS[name],
        lm_head=bool(fields.get("lm_head")),
        dynamic=tuple(_override(*item) for item in (fields.get("dynamic") or {}).items()),
        inside=tuple(_flat(fields.get("modules_in_block_to_quantize") or ())),
    )
    return _changed(base, {"bits": 4, "group_size": 128, "sym": True} | dict(fields))


def _flat(names: Any) -> Iterator[str]:
    """Names in lists of lists, those of one matmul beside each other."""
    for name in names:
        yield from (name,) if isinstance(name, str) else _flat(name)


def _override(pattern: str, changes: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    if pattern.startswith("-:"):
        return pattern.removeprefix("-:"), None
    return pattern.removeprefix("+:"), changes


def _changed(scheme: GPTQ, fields: Mapping[str, Any]) -> GPTQ:
    bits = fields.get("bits", scheme.bits)
    if bits not in BITS:
        raise UnsupportedError(f"gptq with bits {bits!r}: tlk reads {', '.join(map(str, BITS))}")
    group_size = fields.get("group_size", scheme.group_size)
    return replace(
        scheme,
        bits=bits,
        group_size=None if group_size in (None, -1) else int(group_size),
        symmetric=bool(fields.get("sym", scheme.symmetric)),
    )


def zeros(qzeros: Tensor, bits: int, n: int, version: int) -> Tensor:
    """Zero points uint8 [g, n] of qzeros [g, n·bits/32]; those of version 1 are one less, by word."""
    if version == 2:
        return unpack_words(qzeros, bits, n)
    if bits == 3:  # fields cross words
        return (unpack_words(qzeros, bits, n) + 1) & 7
    words = (qzeros.long() + ONES[bits]) & 0xFFFFFFFF
    return unpack_words(_as_int32(words), bits, n)


def order_of_groups(module: str, g_idx: Tensor, groups: int) -> Tensor | None:
    """The inputs [1, K], int32, sorted by group; None where they are already.

    CheckpointError unless every group has the same number of inputs.
    """
    g_idx = g_idx.long()
    k = len(g_idx)
    in_range = bool(((g_idx >= 0) & (g_idx < groups)).all())
    members = torch.bincount(g_idx, minlength=groups) if in_range else g_idx[:0]
    if not in_range or k % groups or not bool((members == k // groups).all()):
        raise CheckpointError(
            f"{module}.g_idx does not give each of {groups} groups as many inputs"
        )
    if bool((g_idx.diff() >= 0).all()):
        return None
    return g_idx.argsort(stable=True).int()[None]


def write(packed: Packed, codes: Tensor) -> dict[str, Tensor]:
    """The tensors, by suffix, of symmetric 4-bit `codes` uint8 [N, K] with `packed`'s scale, version 1."""
    n, k = codes.shape
    scale = packed["scale"]
    groups = scale.shape[1]
    eights = torch.full((groups, n // 8), 0x77777777, dtype=torch.int32, device=codes.device)
    return {
        "qweight": pack_words(codes, 4).T.contiguous(),
        "qzeros": eights,
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": (torch.arange(k, device=codes.device) // (k // groups)).int(),
    }


def _as_int32(words: Tensor) -> Tensor:
    """int64 0..2³²-1 as the int32 of the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).int()
