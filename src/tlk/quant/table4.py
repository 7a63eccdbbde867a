"""4-bit indices into a table of sixteen values, as bitsandbytes has them: NF4 and its FP4.

    w ≈ table[q] · absmax        one absmax per block of inputs

NF4 puts the values at quantiles of a normal distribution: Dettmers et al., "QLoRA",
https://arxiv.org/abs/2305.14314. FP4 here is bitsandbytes' own, which is not E2M1.

Double quantization ("nested") stores absmax itself in 8 bit, an index into a map of 256 values:

    absmax(n, b) = map[scale[n, b]] · nested_absmax[n, (nested_start[n] + b) // 256] + nested_offset[n]

Blocks of 256 absmax run over the rows of the weight, so a row begins anywhere in one.

Storage at blocks of 64: 4.5 bits a weight, 4.127 nested.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tlk.quant._weight_only import WeightOnly
from tlk.quant.codes import grouped, nearest, pack_nibbles
from tlk.quant.format import Packed, check_fits

NESTED_BLOCK = 256
# fmt: off
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 0.5, 2 / 12, 0.25,
        -0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -0.5, -2 / 12, -0.25,
    ),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class TableFormat(WeightOnly):
    """weight uint8 [n, k/2] as codes.py packs it, scale [n, k/blocksize], table float32 [1, 16].

    scale is absmax in float32, or uint8 if nested, with nested_map float32 [1, 256], nested_absmax
    float32 [n, S] for the S blocks that a row can touch, nested_start int32 [n, 1] and nested_offset
    float32 [n, 1].
    """

    kind: ClassVar[str] = "table4"
    name: Literal["nf4", "fp4"] = "nf4"
    blocksize: int = 64
    nested: bool = False

    def __post_init__(self) -> None:
        if self.name not in TABLES:
            raise ValueError(f"name must be nf4 or fp4, got {self.name!r}")
        if self.blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ValueError(f"blocksize must be a power of 2, 32 to 4096, got {self.blocksize}")

    def refusal(self, n: int, k: int) -> str | None:
        """Why an [n, k] weight cannot be stored so, or None."""
        fits = k % self.blocksize == 0
        return None if fits else f"{k} inputs are not divisible by {self.blocksize}"

    def empty(
        self,
        n: int,
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        check_fits(self, n, k)
        shapes = {
            "weight": (n, k // 2, torch.uint8),
            "scale": (n, k // self.blocksize, torch.uint8 if self.nested else torch.float32),
            "table": (1, 16, torch.float32),
        }
        if self.nested:
            shapes |= {
                "nested_absmax": (n, touched(k // self.blocksize), torch.float32),
                "nested_start": (n, 1, torch.int32),
                "nested_map": (1, 256, torch.float32),
                "nested_offset": (n, 1, torch.float32),
            }
        return {
            key: torch.empty(rows, columns, dtype=kind, device=device)
            for key, (rows, columns, kind) in shapes.items()
        }

    def quantize(self, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        """Round to the nearest value of the table; `dtype` changes nothing, absmax is float32."""
        check_fits(self, *weight.shape)
        blocks = grouped(weight.float(), weight.shape[1] // self.blocksize)
        absmax = blocks.abs().amax(-1)
        codes = self.codes(blocks / torch.where(absmax == 0, 1, absmax)[..., None]).flatten(1)
        packed = {"weight": pack_nibbles(codes, self.blocksize), "scale": absmax}
        return packed | {"table": self.table(weight.device)} | (nest(absmax) if self.nested else {})

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """The sixteen values, float32 [1, 16], by code."""
        return torch.tensor([TABLES[self.name]], device=device)

    def codes(self, values: Tensor) -> Tensor:
        """The codes, uint8, of the entries of the table nearest to `values` in -1..1, of any shape."""
        table = self.table(values.device)[0]
        order = table.argsort(stable=True)
        if self.name == "fp4":  # of its two zeros, the first
            order = order[order != 8]
        return order[nearest(values, table[order])].to(torch.uint8)


NF4, FP4 = TableFormat("nf4"), TableFormat("fp4")


def touched(blocks: int) -> int:
    """How many runs of 256 absmax a row of `blocks` of them can touch, wherever it begins."""
    latest = NESTED_BLOCK - math.gcd(blocks, NESTED_BLOCK)
    return (latest + blocks - 1) // NESTED_BLOCK + 1


def nest(absmax: Tensor) -> Packed:
    """Double quantization of `absmax` [n, B], as packed tensors: scale, and all that begin with nested."""
    offset = absmax.mean()
    flat = (absmax - offset).flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % NESTED_BLOCK))
    runs = padded.view(-1, NESTED_BLOCK)
    largest = runs.abs().amax(1)
    codes = nearest(
        runs / torch.where(largest == 0, 1, largest)[:, None], dynamic_map(absmax.device)
    )
    scale = codes.flatten()[: flat.numel()].view(absmax.shape).to(torch.uint8)
    return spread_runs(scale, largest, dynamic_map(absmax.device), offset)


def spread_runs(scale: Tensor, largest: Tensor, values: Tensor, offset: Tensor) -> Packed:
    """Give every row its own of what belongs to runs of 256 absmax across rows.

    scale uint8 [n, B], largest float32 [n·B / 256, rounded up], values float32 [256], offset float32 [].
    """
    n, blocks = scale.shape
    first = torch.arange(n, device=scale.device)[:, None] * blocks
    runs = first // NESTED_BLOCK + torch.arange(touched(blocks), device=scale.device)
    return {
        "scale": scale,
        "nested_absmax": largest[runs.clamp(max=largest.numel() - 1)],
        "nested_start": (first % NESTED_BLOCK).int(),
        "nested_map": values.float()[None],
        "nested_offset": offset.float().expand(n, 1).contiguous(),
    }


def unnest(packed: Packed) -> Tensor:
    """absmax float32 [n, B] of double-quantized `packed`."""
    scale, start = packed["scale"], packed["nested_start"]
    run = (start + torch.arange(scale.shape[1], device=scale.device)) // NESTED_BLOCK
    largest = packed["nested_absmax"].gather(1, run)
    return packed["nested_map"][0][scale.int()] * largest + packed["nested_offset"]


def dynamic_map(device: torch.device | str | None = None) -> Tensor:
    """The 256 sorted values, float32, that bitsandbytes rounds absmax to.

    For i = 0 to 6 the 2ⁱ middles of an even division of 0.1 to 1, times 10^(i - 6), with both signs;
    and 0 and 1. Dettmers, "8-Bit Approximations for Parallelism", https://arxiv.org/abs/1511.04561.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)
