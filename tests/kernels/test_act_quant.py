import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpret, late
from tests.kernels.launches import record_launches
from tlk.errors import UnsupportedError
from tlk.kernels import act_quant
from tlk.kernels.act_quant import (
    LARGEST,
    LONGEST_IN_REGISTERS,
    default_config,
    gated_quant,
    gated_quant_reference,
    quantize_act,
    quantize_act_reference,
    rms_norm_quant,
    rms_norm_quant_reference,
)

EPS = 0.5  # large enough that forgetting it fails
LONG = LONGEST_IN_REGISTERS + 77
# more rows than a program takes, rows that end within a block of 128, several parts, the loop
SHAPES = [(1, 64), (37, 192), (2, 5, 256), (3, 1023), (2, 2600), (2, LONG)]
FP8, INT8 = torch.float8_e4m3fn, torch.int8
BF16 = torch.bfloat16
SCALINGS = ["row", "block", "static"]


def rows_of_mixed_scale(shape, device, dtype):
    scale = 10.0 ** torch.randint(-2, 4, (*shape[:-1], 1), device=device)
    return (torch.randn(shape, device=device) * scale).to(dtype)


def options(scaling, device):
    if scaling == "static":
        return {"scale": torch.tensor([0.37], device=device)}
    return {"group_size": 128 if scaling == "block" else None}


def spread(scale, n):
    """`scale` [..., 1] or one for each 128 columns, as [..., n]."""
    return scale.repeat_interleave(1 if scale.shape[-1] == 1 else 128, -1)[..., :n]


def check(actual, expected, h):
    """Scales to a few last digits, and codes that differ only where `h` is halfway between two."""
    (q, scale), (like, like_scale) = actual, expected
    assert q.dtype == like.dtype and q.shape == like.shape == h.shape and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.is_contiguous()
    torch.testing.assert_close(scale, like_scale, rtol=2e-6, atol=0)
    exact = h.double() / spread(scale, h.shape[-1]).double()
    largest = LARGEST[q.dtype]
    error = (q.double() - exact.clamp(-largest, largest)).abs()
    slack = 4e-6 * exact.abs() + 1e-6 * largest  # float32's; gelu cancels for large negative gates
    if q.dtype == INT8:
        step = torch.ones_like(exact)
    else:  # three bits behind the leading one, of which the smallest normal number has 2⁻⁶
        step = 2.0 ** (exact.abs().clamp(2.0**-6, 448.0).log2().floor() - 3)
    assert (error <= step / 2 + slack).all(), f"off by {(error / step).max():.3f} steps"
    assert (q.float() != like.float()).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_reference_is_what_the_formula_says(dtype):
    x = torch.tensor([[0.0, 1.0, -2.0, 0.5], [0.0, 0.0, 0.0, 0.0], [3e4, -1.0, 2e4, 0.1]])
    q, scale = quantize_act_reference(x, dtype)
    largest = LARGEST[dtype]
    torch.testing.assert_close(scale, torch.tensor([[2.0 / largest], [1.0], [3e4 / largest]]))
    assert q[0, 2] == -largest and q[2, 0] == largest and (q[1].float() == 0).all()
    codes = (x / scale).round() if dtype == INT8 else x / scale
    torch.testing.assert_close(q.float(), codes.to(dtype).float())


def test_int8_rounds_halves_to_even(device):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=device)
    expected = torch.tensor([[127, 0, 2, 2, 0, -2, -2, 126]], dtype=INT8, device=device)
    q, scale = quantize_act(x, INT8)
    assert scale.item() == 1 and torch.equal(q, expected)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_quantize_act(dtype, shape, scaling, device):
    x, how = rows_of_mixed_scale(shape, device, BF16), options(scaling, device)
    q, scale = quantize_act(x, dtype, **how)
    like, like_scale = quantize_act_reference(x, dtype, **how)
    assert torch.equal(scale, like_scale) and torch.equal(q.float(), like.float())
    check((q, scale), (like, like_scale), x.float())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_rms_norm_quant(dtype, shape, scaling, device):
    x, how = rows_of_mixed_scale(shape, device, BF16), options(scaling, device)
    w = torch.randn(shape[-1], device=device).to(BF16)
    for weight, offset in ((w, 0.0), (w, 1.0), (None, 0.0)):
        factor = None if weight is None else w.float() + offset
        h = F.rms_norm(x.float(), shape[-1:], factor, EPS)
        actual = rms_norm_quant(x, weight, dtype, EPS, weight_offset=offset, **how)
        check(actual, rms_norm_quant_reference(x, weight, dtype, EPS, offset, **how), h)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_gated_quant(dtype, shape, scaling, device):
    x = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(BF16)
    how = options(scaling, device)
    gate, up = x.float().chunk(2, -1)
    for activation, act in (
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda g: F.gelu(g, approximate="tanh")),
    ):
        actual = gated_quant(x, dtype, activation, **how)
        check(actual, gated_quant_reference(x, dtype, activation, **how), act(gate) * up)


@pytest.mark.parametrize("wide", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(wide, device):
    x = rows_of_mixed_scale((5, 300), device, wide)
    for scaling in SCALINGS:
        how = options(scaling, device)
        check(quantize_act(x, FP8, **how), quantize_act_reference(x, FP8, **how), x.float())


VIEWS = {
    "heads of a fused projection": lambda x: x[:, 24:120].unflatten(1, (2, 48)),
    "rows of wider rows": lambda x: x[:, 7:107],
    "every second row": lambda x: x[::2],
    "three strides": lambda x: x.view(3, 2, 4, 2, 20)[:, :, ::2, ::2],
    "transposed": lambda x: x.T,
    "expanded": lambda x: x[:1].expand(5, 160),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_strided_input(scaling, view, device):
    x = VIEWS[view](rows_of_mixed_scale((6, 160), device, BF16))
    how, w = options(scaling, device), torch.ones(x.shape[-1], device=device)
    check(quantize_act(x, INT8, **how), quantize_act_reference(x, INT8, **how), x.float())
    h = F.rms_norm(x.float(), x.shape[-1:], None, EPS)
    actual = rms_norm_quant(x, w, FP8, EPS, **how)
    check(actual, rms_norm_quant_reference(x, w, FP8, EPS, **how), h)
    gate, up = x.float().chunk(2, -1)
    expected = gated_quant_reference(x, INT8, "silu", **how)
    check(gated_quant(x, INT8, "silu", **how), expected, F.silu(gate) * up)


@pytest.mark.parametrize("n", [300, LONG])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_earlier_kernels_wrote_is_read_after_the_wait(n, scaling):
    x, w, how = torch.randn(2, n), torch.randn(n), options(scaling, "cpu")
    expected = rms_norm_quant_reference(x, w, INT8, EPS, **how)
    with interpret(), late(x):
        actual = rms_norm_quant(x, w, INT8, EPS, **how)
        plain = quantize_act(x, FP8, **how)
    check(actual, expected, F.rms_norm(x, (n,), w, EPS))
    check(plain, quantize_act_reference(x, FP8, **how), x)


@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
@pytest.mark.parametrize("n", [300, LONG])
def test_extremes(n, dtype, device):
    """The largest and the smallest float32 values, and rows and blocks of zeros."""
    x = torch.randn(4, n, device=device)
    x[0] *= 1e38 / x[0].abs().max()
    x[1] *= 1e-38
    x[2] = 0
    x[3, :128] = 0
    for scaling in ("row", "block"):
        how = options(scaling, device)
        q, scale = quantize_act(x, dtype, **how)
        like, like_scale = quantize_act_reference(x, dtype, **how)
        assert torch.equal(scale, like_scale) and torch.equal(q.float(), like.float())
        assert q[0].float().abs().max() == LARGEST[dtype]
        assert (scale[2] == 1).all() and (q[2].float() == 0).all()
        assert scale.isfinite().all() and (scale > 0).all()
    assert scale[3, 0] == 1 and scale[3, 1] != 1


@pytest.mark.parametrize(
    "n, bad", [(300, torch.nan), (300, torch.inf), (300, -torch.inf), (LONG, torch.nan)]
)
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_what_is_not_finite_stays_so(dtype, n, bad, device):
    x = torch.randn(3, n, device=device)
    x[1, 200] = bad
    for scaling in ("row", "block"):
        for scale in (
            quantize_act(x, dtype, **options(scaling, device))[1],
            gated_quant(torch.cat([x, x], 1), dtype, "gelu", **options(scaling, device))[1],
        ):
            assert not scale[1].isfinite().all() and scale[[0, 2]].isfinite().all()
            if scaling == "block":
                assert scale[1, 0].isfinite() and not scale[1, 1].isfinite()


def test_a_static_scale_saturates(device):
    x = torch.tensor([[1e4, -1e4, 447.9, 3.0]], device=device)
    one = torch.ones((), device=device)
    q, scale = quantize_act(x, FP8, scale=one)
    assert q.float().tolist() == [[448.0, -448.0, 448.0, 3.0]] and scale.tolist() == [[1.0]]
    q, scale = quantize_act(x, INT8, scale=one)
    assert q.tolist() == [[127, -127, 127, 3]]
    assert scale.data_ptr() != one.data_ptr()


def test_float8_keeps_a_nan_under_a_static_scale(device):
    x = torch.tensor([[1.0, torch.nan, 2.0]], device=device)
    q, _ = quantize_act(x, FP8, scale=torch.ones(1, device=device))
    assert q.float().isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,)], ids=str)
def test_leading_dimensions(shape, device):
    x, w = torch.randn(shape, device=device), torch.ones(shape[-1], device=device)
    for group, columns in ((None, 1), (128, 1)):
        for q, scale in (
            quantize_act(x, INT8, group_size=group),
            rms_norm_quant(x, w, FP8, group_size=group),
            gated_quant(torch.cat([x, x], -1), INT8, "silu", group_size=group),
        ):
            assert q.shape == shape and scale.shape == (*shape[:-1], columns)


def test_the_kernel_ran_and_not_its_reference(device, monkeypatch):
    short = record_launches(monkeypatch, act_quant, "_quant_kernel")
    long = record_launches(monkeypatch, act_quant, "_quant_loop_kernel")
    x, w = torch.randn(3, LONG, device=device), torch.randn(LONG, device=device)
    quantize_act(x, INT8)
    rms_norm_quant(x, w, FP8, group_size=128)
    assert long == [(3,), (3,)] and short == []
    quantize_act(x, INT8, group_size=128)
    gated_quant(x[:, : 2 * 6000], FP8, "silu")
    assert len(short) == 2 and short[0][0] > 3 and short[1] == (3,)


def test_rows_are_cut_only_where_no_statistic_spans_them():
    assert default_config(8192, 4096, True, 132)[:2] == (1, 4096)
    assert default_config(8192, 4096, False, 132)[:2] == (1, 2048)
    assert default_config(1, 4096, False, 132)[:2] == (1, 512)
    assert default_config(8192, 100, False, 132)[:2] == (16, 128)


@pytest.mark.parametrize("arch", [75, 80, 86])
def test_float8_needs_a_gpu_that_has_it(arch):
    x, w = torch.randn(2, 64), torch.ones(64)
    with interpret(sm=arch):
        for call in (
            lambda: quantize_act(x, FP8),
            lambda: rms_norm_quant(x, w, FP8),
            lambda: gated_quant(x, FP8, "silu"),
        ):
            with pytest.raises(UnsupportedError, match=f"need sm_89 or newer, cpu is sm_{arch}"):
                call()
        check(quantize_act(x, INT8), quantize_act_reference(x, INT8), x)


@pytest.mark.parametrize("scaling", ["block", "static"])
def test_registration(scaling, device):
    x, how = torch.randn(3, 256, device=device), options(scaling, device)
    w = torch.randn(256, device=device)
    ops = torch.ops.tlk
    torch.library.opcheck(ops.quantize_act.default, (x, INT8), how)
    torch.library.opcheck(ops.rms_norm_quant.default, (x, w, INT8), how)
    torch.library.opcheck(ops.gated_quant.default, (x, INT8, "silu"), how)
    compiled = torch.compile(
        lambda x: quantize_act(x * 2, INT8, **how), fullgraph=True, backend="aot_eager"
    )
    check(compiled(x), quantize_act_reference(2 * x, INT8, **how), 2 * x)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: quantize_act(x.int(), INT8), TypeError, "x must be float32 or .*, got int32"),
        (lambda x: quantize_act(x[0, 0], INT8), ValueError, r"x must have a last dim.*\(\)"),
        (lambda x: quantize_act(x[:, :0], INT8), ValueError, r"x must have a last dim.*\(2, 0\)"),
        (lambda x: quantize_act(x, BF16), TypeError, "dtype must be .*, got torch.bfloat16"),
        (lambda x: quantize_act(x, INT8, group_size=64), ValueError, "None or 128, got 64"),
        (lambda x: quantize_act(x, INT8, scale=x), ValueError, r"1 element, got shape \(2, 64\)"),
        (lambda x: quantize_act(x, INT8, scale=x[0, :1].half()), TypeError, "scale must be float"),
        (
            lambda x: quantize_act(x, INT8, group_size=128, scale=x[0, :1]),
            ValueError,
            "group_size must be None",
        ),
        (
            lambda x: quantize_act(x, INT8, scale=torch.ones(1, device="meta")),
            ValueError,
            "scale must be on .*, got meta",
        ),
        (lambda x: rms_norm_quant(x, x[0, :9], INT8), ValueError, r"weight must have shape \(64\)"),
        (lambda x: rms_norm_quant(x, x[0].int(), INT8), TypeError, "weight must be float32"),
        (lambda x: gated_quant(x[:, :9], INT8, "silu"), ValueError, r"even last dim.*\(2, 9\)"),
        (lambda x: gated_quant(x, INT8, "relu"), ValueError, "activation must be .*, got 'relu'"),
    ],
)
def test_bad_input(call, error, message, device):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 64, device=device))
