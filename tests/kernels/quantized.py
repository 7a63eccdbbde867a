"""Random quantized weights of every kind, and decoders of them that share nothing with the package's.

The decoders take the formats' own words: two codes a byte in order, scales repeated over their groups.
"""

import torch
from torch import Tensor

from tlk.kernels._dequant import Quantized

# what a test runs through: (kind, group size; 0 for whole rows)
INT4 = [("int4", 32), ("int4", 64), ("int4", 128), ("int4", 0)]
ALL = [
    *INT4,
    ("int4 asymmetric", 128),
    ("int4 asymmetric", 32),
    ("int4 asymmetric", 0),
    ("int8", 0),
    ("int8", 128),
    ("int8 asymmetric", 64),
    ("table4", 64),
    ("table4 nested", 64),
    ("table4", 128),
    ("mx4", 32),
    ("nv4", 16),
    ("fp8", 0),
    ("fp8", 128),
]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def quantized(
    name: str, n: int, k: int, group: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Quantized:
    """A random weight of kind `name` whose rows and groups have scales of different sizes."""
    new = torch.Generator().manual_seed(seed)
    kind, asymmetric, nested = name.split()[0], "asymmetric" in name, "nested" in name
    size = group or k
    shape = (n, k // size)
    codes = torch.randint(0, 256, (n, k if kind in ("int8", "fp8") else k // 2), generator=new)
    spread = 10.0 ** torch.randint(-2, 1, (n, 1), generator=new) / 8
    scale = (torch.rand(shape, generator=new) + 0.5) * spread
    zero = table = global_scale = None
    parts: list[Tensor] = []
    weight = codes.to(torch.uint8)
    if kind in ("int4", "int8"):
        scale = scale.to(dtype)
        if kind == "int8":
            weight = (codes - 128).to(torch.int8)
        if asymmetric and kind == "int4":
            zero = torch.randint(0, 16, shape, generator=new).to(torch.uint8)
        elif asymmetric:
            zero = torch.randint(-128, 128, shape, generator=new).to(torch.int8)
    elif kind == "table4":
        table = torch.tensor([NF4])
        if nested:
            scale = torch.randint(0, 256, shape, generator=new).to(torch.uint8)
            starts = torch.randint(0, 300, (n, 1), generator=new).int()
            absmax = (torch.rand((n, 3), generator=new) + 0.1) * spread
            values = torch.randn((1, 256), generator=new)
            parts = [absmax, starts, values, spread * 0.3]
    elif kind == "mx4":
        scale = torch.randint(110, 130, shape, generator=new).to(torch.uint8)
    elif kind == "nv4":
        scale = (torch.rand(shape, generator=new) * 400).to(torch.float8_e4m3fn)
        global_scale = spread / 100
    elif kind == "fp8":
        weight = (torch.randn((n, k), generator=new) * 100).clamp(-448, 448)
        weight = weight.to(torch.float8_e4m3fn)
        if group:
            scale = torch.rand((-(-n // 128), -(-k // 128)), generator=new) + 0.1
    tensors = [
        None if t is None else t.to(device) for t in (weight, scale, zero, table, global_scale)
    ]
    parts = [t.to(device) for t in parts]
    return Quantized(*tensors, parts, kind, size)  # type: ignore[arg-type]


def options(w: Quantized) -> dict:
    """The keyword arguments that hand `w` to the public functions, besides weight and scale."""
    return {
        "zero": w.zero,
        "kind": w.kind,
        "group_size": w.group_size,
        "table": w.table,
        "global_scale": w.global_scale,
        "nested": tuple(w.nested) or None,
    }


def decode(w: Quantized) -> Tensor:
    """The matrix in float32, code by code."""
    n, k = w.shape
    if w.kind == "fp8":
        if w.scale.shape == (n, 1):
            return w.weight.float() * w.scale
        rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
        return w.weight.float() * w.scale.cpu()[rows][:, columns].to(w.scale.device)
    if w.kind == "int8":
        q = w.weight.float()
    else:
        halves = w.weight.reshape(n, -1, w.group_size // 2).int()
        q = torch.stack([halves % 16, halves // 16], 2).reshape(n, k)
    group = torch.arange(k, device=q.device) // (k // w.scale.shape[1])
    if w.kind in ("int4", "int8"):
        zero = (8.0 if w.kind == "int4" else 0.0) if w.zero is None else w.zero.float()[:, group]
        return (q.float() - zero) * w.scale.float()[:, group]
    if w.kind == "table4":
        absmax = w.scale
        if w.nested:
            outer, start, values, offset = (t.cpu() for t in w.nested)
            absmax = torch.empty(w.scale.shape)
            for i, row in enumerate(w.scale.tolist()):
                for j, code in enumerate(row):
                    block = (int(start[i]) + j) // 256
                    absmax[i, j] = values[0, code] * outer[i, block] + offset[i, 0]
            absmax = absmax.to(q.device)
        assert w.table is not None
        return w.table[0][q.long()] * absmax[:, group]
    sign, exponent, half = 1 - 2 * (q // 8), q % 8 // 2, q % 2
    magnitude = torch.where(exponent == 0, half / 2, (1 + half / 2) * 2.0 ** (exponent - 1))
    if w.kind == "mx4":
        return sign * magnitude * torch.exp2(w.scale.float() - 127)[:, group]
    assert w.global_scale is not None
    return sign * magnitude * (w.scale.float() * w.global_scale)[:, group]
