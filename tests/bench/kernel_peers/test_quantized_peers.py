"""The layouts in which other packages want the weights: each fake undoes its own, as its package does."""

import pytest
import torch

from tests.bench.kernel_peers.packages import install
from tlk.bench.case import Case, Inputs
from tlk.bench.cases.dequant_mm import _case
from tlk.bench.kernel_peers import quantized_peers as peers
from tlk.bench.kernels import difference, seeded
from tlk.errors import UnsupportedError
from tlk.kernels.scaled_mm import scaled_mm

M, N, K = 3, 64, 256
BF16 = Inputs("cpu", torch.bfloat16)


def linear(variant, **options):
    return _case(variant, M, N, K, **options)


def peer(name, of=peers.DEQUANT_MM):
    return next(p for p in of if p.name == name)


def agrees(name, variant, tolerance=0.01):
    case = linear(variant)
    result = peer(name).prepare(case, seeded(case, BF16, 0))()
    assert difference(result, case.reference(*seeded(case, BF16, 0))) < tolerance


@pytest.mark.parametrize(
    "variant",
    ["int4", "int4-asymmetric", "int4-channel", "nf4", "mx4", "nv4", "int8", "fp8", "fp8-block"],
)
def test_cublas(variant):
    agrees("cublas bf16", variant)


@pytest.mark.parametrize("variant", ["int4", "int4-g32", "int4-asymmetric"])
def test_tinygemm(monkeypatch, variant):
    """ATen's CUDA op takes bytes of an even code (high) and the odd one after it; its CPU op, codes."""

    def convert(packed, inner):
        assert packed.shape == (N, K // 2) and inner == 8
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten(1)
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), inner)

    for name, op in (
        ("_convert_weight_to_int4pack", convert),
        ("_weight_int4pack_mm", torch.ops.aten._weight_int4pack_mm_for_cpu),
    ):
        monkeypatch.setattr(torch.ops.aten, name, op)
    agrees("tinygemm", variant)


class Gemlite:
    """Weights as gemlite takes them: codes [N, K] and (q - zero) · scale."""

    def __init__(self, device, dtype, fp8=None):
        self.fp8, self.dtype = fp8, dtype

    def from_weights(self, weight, scales, zeros=None, bits=8, group=K):
        assert weight.dtype == (self.fp8 or (torch.int8 if bits == 8 else torch.uint8))
        w = weight.float().unflatten(1, (-1, group))
        if zeros is not None:
            w = w - zeros.float()[..., None]
        w = (w * scales.float()[..., None]).flatten(1).to(self.dtype)
        return lambda x: x @ w.t()


@pytest.mark.parametrize("variant", ["int4", "int4-asymmetric", "int4-channel", "int8", "fp8"])
def test_gemlite(monkeypatch, variant):
    def codes(**where):
        return SimpleInts(Gemlite(**where))

    install(monkeypatch, "gemlite.helper", A16Wn=codes, A16W8=Gemlite)
    agrees("gemlite", variant)


class SimpleInts:
    def __init__(self, layer):
        self.layer = layer

    def from_weights(self, codes, scales, zeros, bits, group):
        assert bits == 4 and codes.max() < 16
        return self.layer.from_weights(codes, scales, zeros, bits, group)


class QuantState:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def matmul_4bit(x, packed, quant_state):
    s = quant_state
    assert packed.shape == (N * K // 2, 1) and s.shape == (N, K) and s.quant_type == "nf4"
    codes = torch.cat([packed >> 4, packed & 15], 1).view(N, K)
    w = s.code[codes.long()] * s.absmax.view(N, -1).repeat_interleave(s.blocksize, 1)
    return x @ w.to(s.dtype).t()


def test_bitsandbytes(monkeypatch):
    install(monkeypatch, "bitsandbytes.functional", QuantState=QuantState)
    install(monkeypatch, "bitsandbytes", matmul_4bit=matmul_4bit)
    install(monkeypatch, "bitsandbytes.functional", QuantState=QuantState)
    agrees("bitsandbytes", "nf4")


def product(x, weight, x_scale, scale, *, out_dtype, use_fast_accum):
    assert weight.stride(0) == 1 and x_scale.shape == (len(x), 1) and scale.shape == (1, N)
    assert use_fast_accum
    return ((x.float() @ weight.float()) * x_scale * scale).to(out_dtype)


def test_scaled_mm_on_quantized_activations(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", product)
    for variant in ("int8", "fp8"):
        agrees("_scaled_mm", variant, tolerance=0.08)


@pytest.mark.parametrize(
    ("name", "case", "why"),
    [
        ("tinygemm", linear("nf4"), "int4 in groups"),
        ("gemlite", linear("nf4"), "int4, int8 and fp8"),
        ("gemlite", linear("fp8-block"), "a scale for each row"),
        ("gemlite", linear("int8-asymmetric"), "a scale for each row"),
        ("bitsandbytes", linear("int4"), "NF4"),
        ("_scaled_mm", linear("int4"), "8 bits"),
        ("cublas bf16", linear("int4", gated=True, activation="silu"), "plain linear"),
        ("cublas bf16", linear("int4", extras="bias"), "plain linear"),
        ("cublas bf16", linear("int4", extras="norm"), "plain linear"),
        ("cublas bf16", linear("nf4-nested"), "not quantized again"),
    ],
)
def test_what_they_have_not(name, case, why):
    with pytest.raises(UnsupportedError, match=why):
        peer(name).prepare(case, seeded(case, BF16, 0))


def operands(dtype):
    if dtype == torch.int8:
        x, w = (torch.randint(-127, 128, (n, K), dtype=torch.int8) for n in (M, N))
    else:
        x, w = (torch.randn(n, K).to(dtype) for n in (M, N))
    return x, torch.rand(M, 1) * 0.1, w, torch.rand(N, 1) * 0.1


def test_8_bit_products(monkeypatch):
    case = Case("scaled_mm", "s", tuple, scaled_mm, len, len)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    inputs = operands(torch.float8_e4m3fn)
    expected = scaled_mm(*inputs)
    assert difference(peer("_scaled_mm", peers.SCALED_MM).prepare(case, inputs)(), expected) < 0.01
    inputs = operands(torch.int8)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    whole = peer("_int_mm", peers.SCALED_MM).prepare(case, inputs)()
    assert difference((whole * inputs[1] * inputs[3].t()).bfloat16(), scaled_mm(*inputs)) < 0.01
    with pytest.raises(UnsupportedError, match="float8_e4m3fn without"):
        peer("_scaled_mm", peers.SCALED_MM).prepare(case, inputs)


def test_8_bit_products_of_bitsandbytes(monkeypatch):
    install(
        monkeypatch, "bitsandbytes.functional",
        int8_linear_matmul=lambda a, b: a.int() @ b.int().t(),
        int8_mm_dequant=lambda y, rows, columns: (y * rows[:, None] * columns / 127**2).half(),
    )  # fmt: skip
    case, inputs = Case("scaled_mm", "s", tuple, scaled_mm, len, len), operands(torch.int8)
    result = peer("bitsandbytes int8", peers.SCALED_MM).prepare(case, inputs)()
    assert difference(result.bfloat16(), scaled_mm(*inputs)) < 0.01
