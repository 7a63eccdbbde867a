"""What all formats promise, and how far each is from the weight it stores."""

import pytest
import torch

from tlk.quant.fp4 import MXFP4, NVFP4
from tlk.quant.fp8 import Fp8
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8, Int8Weight
from tlk.quant.table4 import FP4, NF4, TableFormat

FORMATS = [
    Int4(),
    Int4(32, symmetric=False),
    Int4(None),
    Int4(None, symmetric=False),
    Int8Weight(),
    Int8Weight(64),
    Int8Weight(32, symmetric=False),
    Int8(),
    Fp8("tensor"),
    Fp8("channel"),
    Fp8("block"),
    NF4,
    FP4,
    TableFormat("nf4", 128, nested=True),
    TableFormat("fp4", 64, nested=True),
    MXFP4(),
    NVFP4(),
]
# relative root mean square error of rounding to nearest: normal weights, and Student's t of 5 degrees
YARDSTICK = [
    (Int4(32, symmetric=False), 0.0808, 0.0928),
    (Int4(64, symmetric=False), 0.0911, 0.1120),
    (Int4(128, symmetric=False), 0.1006, 0.1332),
    (Int4(32), 0.0949, 0.1197),
    (Int4(64), 0.1029, 0.1395),
    (Int4(128), 0.1109, 0.1625),
    (Int4(None), 0.1472, 0.3332),
    (TableFormat("nf4", 64), 0.0920, 0.1047),
    (TableFormat("nf4", 128), 0.0956, 0.1178),
    (TableFormat("fp4", 64), 0.1219, 0.1542),
    (TableFormat("fp4", 128), 0.1286, 0.1791),
    (MXFP4(), 0.1123, 0.1240),
    (NVFP4(), 0.0951, 0.0923),
    (Int8(), 0.0087, 0.0200),
    (Int8Weight(), 0.0087, 0.0200),
    (Fp8("tensor"), 0.0265, 0.0265),
    (Fp8("channel"), 0.0265, 0.0262),
    (Fp8("block"), 0.0264, 0.0264),
]


def weights(n, k, dtype=torch.float32, seed=0):
    """Rows of mixed scales, with a row and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-3, 1, n)[:, None]
    w[1] = 0
    w[2, :128] = 0
    return w.to(dtype)


def given(packed):
    """What `encode` takes beside the weight."""
    return [packed[name] for name in ("scale", "zero", "global_scale") if name in packed]


def relative_error(weight, format):
    error = format.dequantize(format.quantize(weight, torch.float32)) - weight
    return (error.square().sum() / weight.square().sum()).sqrt().item()


def student(n, k, degrees, generator):
    normal = torch.randn(n, k, generator=generator)
    squares = torch.randn(degrees, n, k, generator=generator).square_().sum(0)
    return normal / (squares / degrees).sqrt_()


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 4096, generator=generator)
    return normal, student(256, 4096, 5, generator)


@pytest.mark.parametrize("format, normal, heavy", YARDSTICK, ids=lambda v: str(v))
def test_rounding_to_nearest_is_as_good_as_the_yardstick(format, normal, heavy, samples):
    assert relative_error(samples[0], format) == pytest.approx(normal, rel=0.02)
    # the largest of a row of t(5) decides its scale, and 256 rows are a small sample of those
    tolerance = 0.1 if format in (Int4(None), Int8(), Int8Weight()) else 0.02
    assert relative_error(samples[1], format) == pytest.approx(heavy, rel=tolerance)


def test_double_quantization_costs_little(samples):
    for name in ("nf4", "fp4"):
        plain, nested = (
            relative_error(samples[0], TableFormat(name, 64, nested)) for nested in (False, True)
        )
        assert plain < nested < plain * 1.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_empty_has_the_shapes_of_quantize(format, dtype):
    weight = weights(5, 256, dtype)
    packed, empty = format.quantize(weight), format.empty(5, 256, "cpu", dtype)
    assert packed.keys() == empty.keys()
    for name, tensor in packed.items():
        assert tensor.shape == empty[name].shape and tensor.dtype == empty[name].dtype, name
        assert tensor.is_contiguous()
    assert all(t.is_meta for t in format.empty(5, 256, "meta").values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_stay_zero_and_scales_are_usable(format, dtype):
    weight = weights(6, 256, dtype)
    packed = format.quantize(weight)
    y = format.dequantize(packed)
    assert y.isfinite().all() and y.dtype == torch.float32 and y.shape == weight.shape
    if "nested_absmax" not in packed:
        assert (y[1] == 0).all()
    scale = packed["scale"].float()
    if packed["scale"].dtype != torch.uint8 and format not in (NF4, FP4, TableFormat("nf4", 128)):
        assert (scale != 0).all()
    assert torch.equal(format.dequantize(packed, dtype), y.to(dtype))


@pytest.mark.parametrize("format", [f for f in FORMATS if hasattr(f, "encode")], ids=str)
def test_what_is_on_the_grid_is_kept(format):
    first = format.quantize(weights(4, 256))
    weight = format.dequantize(first)
    again = format.encode(weight, *given(first))
    assert all(torch.equal(again[name].float(), first[name].float()) for name in first)


@pytest.mark.parametrize("format", [f for f in FORMATS if hasattr(f, "encode")], ids=str)
def test_codes_come_from_scales_as_they_are_stored(format):
    weight = weights(8, 256, torch.bfloat16, seed=3)
    packed = format.quantize(weight)
    again = format.encode(weight, *given(packed))
    assert all(torch.equal(again[name].float(), packed[name].float()) for name in packed)
    if isinstance(format, Int8 | Fp8):  # what a file in the model's dtype can hold
        assert torch.equal(packed["scale"], packed["scale"].bfloat16().float())


@pytest.mark.parametrize(
    "format, k, unit", [(Int4(), 192, 128), (Int4(None), 5, 2), (Int8Weight(64), 96, 64),
                        (NF4, 96, 64), (MXFP4(), 48, 32), (NVFP4(), 24, 16)],
)  # fmt: skip
def test_inputs_that_do_not_divide_are_refused(format, k, unit):
    assert format.refusal(4, k) == f"{k} inputs are not divisible by {unit}"
    for call in (lambda: format.empty(4, k), lambda: format.quantize(torch.randn(4, k))):
        with pytest.raises(ValueError, match=rf"cannot store a weight \[4, {k}\]"):
            call()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Int4(16), "group_size must be None or one of"),
        (lambda: Int8Weight(7), "group_size must be None, 32, 64 or 128, got 7"),
        (lambda: Fp8("row"), "granularity must be tensor, channel or block, got 'row'"),
        (lambda: Fp8("block", static=True), "static must be False with blocks"),
        (lambda: TableFormat("nf5"), "name must be nf4 or fp4"),
        (lambda: TableFormat("nf4", 48), "blocksize must be a power of 2"),
    ],
)
def test_options_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_storage_is_what_the_docstrings_say():
    n, k = 256, 4096
    for format, bits in [
        (Int4(), 4.125), (Int4(symmetric=False), 4.1875), (Int8Weight(128), 8.125), (NF4, 4.5),
        (TableFormat("nf4", 64, nested=True), 4.127), (MXFP4(), 4.25), (NVFP4(), 4.5), (Int8(), 8.0),
        (Fp8("block"), 8.002),
    ]:  # fmt: skip
        packed = format.empty(n, k, "meta", torch.bfloat16)
        size = sum(t.numel() * t.element_size() for t in packed.values())
        assert size * 8 / (n * k) == pytest.approx(bits, rel=0.01), format
