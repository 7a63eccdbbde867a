"""Pairs of quantized codes to pairs of float16 or bfloat16, as PTX for Gluon.

What _dequant_pairs.py computes with operations of Triton: its functions make constants without a layout,
which Gluon does not take. A lane has two bytes of a row of W, neighbours, 16 bits apart.
"""

import triton

OFFSETS = {
    ("int4", False): 128.0,
    ("int4", True): 1024.0,
    ("int8", False): 0.0,
    ("int8", True): 1152.0,
}
"""What a code of (kind, whether float16) is more than its value, before zero points are subtracted."""

TABLE_PTX = (
    "{ .reg .b32 v, f, a, b, l, h; and.b32 v, $2, 0x00007777; "
    "shr.u32 f, $2, 1; lop3.b32 f, f, 0x00004444, 0x00003210, 0xEA; "
    "prmt.b32 a, $3, $4, v; prmt.b32 b, $5, $6, v; prmt.b32 l, a, b, f; "
    "prmt.b32 a, $7, $8, v; prmt.b32 b, $9, $10, v; prmt.b32 h, a, b, f; "
    "prmt.b32 $0, l, h, 0x6240; prmt.b32 $1, l, h, 0x7351; }"
)
"""Entries of a table for the four codes in the low half of $2: those of low codes in $0, of high ones in $1.

$3 to $6 hold the low bytes of the 16 entries, $7 to $10 the high ones."""


@triton.constexpr_function
def decode_ptx(kind, half, plane, minus, scaled):
    """The codes at bits 4 · `plane` and 16 more of $1 as a pair in $0; of "table4", $1 is the pair.

    `minus`: $2 is what zero points add, -(zero + offset). `scaled`: the next operand multiplies.
    """
    fma = "fma.rn.f16x2" if half else "fma.rn.bf16x2"
    lines = _constants(kind, half)
    lines += _codes(kind, half, 4 * plane, fma)
    if minus or kind == "int4" or (kind == "int8" and half):
        lines += [f"{fma} a, a, one, {'$2' if minus else 'less'};"]
    if scaled:
        lines += [f"{fma} a, a, {'$3' if minus else '$2'}, nought;"]
    return "{ " + " ".join(lines) + " mov.b32 $0, a; }"


@triton.constexpr_function
def _constants(kind, half):
    """1, -0, -1, minus the offset of a symmetric code, and a power of two, in registers: fma takes no others."""
    values = {
        "one": "0x3C003C00" if half else "0x3F803F80",
        "nought": "0x80008000",
        "minus": "0xBF80BF80",
        "less": ("0xE408E408" if half else "0xC308C308") if kind == "int4" else "0xE480E480",
        "power": "0x74007400" if half else "0x7E807E80",  # 2¹⁴, 2¹²⁶
    }
    if kind == "fp8":
        values["power"] = "0x5C005C00" if half else "0x7B807B80"  # 2⁸, 2¹²⁰
    lines = [f".reg .b32 {name}; mov.b32 {name}, {bits};" for name, bits in values.items()]
    return [*lines, ".reg .b32 a, b;"]


@triton.constexpr_function
def _codes(kind, half, bit, fma):
    """A pair, more by `OFFSETS`, in `a`; as _dequant_pairs.py says, but for int4 in the low bits of 128 or 1024."""
    if kind == "table4":
        return ["mov.b32 a, $1;"]
    if kind == "int4":
        base = "0x64006400" if half else "0x43004300"
        return [f"shr.u32 a, $1, {bit};", f"lop3.b32 a, a, 0x000F000F, {base}, 0xEA;"]
    if kind == "int8":
        if half:
            return ["lop3.b32 a, $1, 0x00FF00FF, 0x64806480, 0x6A;"]
        return [
            "lop3.b32 b, $1, 0x00800080, 0x43004300, 0xEA;",
            "lop3.b32 a, $1, 0x007F007F, 0x43004300, 0xEA;",
            f"{fma} a, b, minus, a;",
        ]
    if kind == "fp8":
        sign, small, mask = (8, 1, "0x3F803F80") if half else (8, 4, "0x07F007F0")
    else:
        sign, small, mask = (12, 3, "0x0E000E00") if half else (12, 6, "0x01C001C0")
    return [
        f"shl.b32 a, $1, {sign - bit};",
        f"shr.u32 b, a, {small};",
        f"and.b32 b, b, {mask};",
        "lop3.b32 a, a, 0x80008000, b, 0xEA;",
        f"{fma} a, a, power, nought;",
    ]
