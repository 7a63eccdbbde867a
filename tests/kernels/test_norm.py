import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpret, late
from tests.kernels.check import check
from tests.kernels.launches import record_launches
from tlk.kernels import norm
from tlk.kernels._rows import as_rows
from tlk.kernels.norm import (
    LONGEST_IN_REGISTERS,
    add_rms_norm,
    add_rms_norm_reference,
    default_config,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)

EPS = 0.5  # large enough that forgetting it fails
LONG = LONGEST_IN_REGISTERS + 77
# more rows than a program takes, rows that end within a block, one that needs the loop
SHAPES = [(1, 64), (33, 100), (2, 5, 256), (3, 1023), (2, 2600), (2, LONG)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows_of_mixed_scale(shape, device, dtype):
    """Small rows beside large ones, so that a lost row cannot hide behind the largest."""
    scale = 10.0 ** torch.randint(-2, 4, (*shape[:-1], 1), device=device)
    return (torch.randn(shape, device=device) * scale).to(dtype)


def plain(x, w, eps=EPS):
    return F.rms_norm(x, x.shape[-1:], w, eps)


def exact(x, w, eps=EPS, offset=0.0):
    return rms_norm_reference(x.float(), None if w is None else w.float(), eps, offset)


@pytest.mark.parametrize("n", [100, LONG])
def test_what_earlier_kernels_wrote_is_read_after_the_wait(n):
    x, r, w = torch.randn(2, n), torch.randn(2, n), torch.randn(n)
    with interpret(), late(x, r):
        y, total = add_rms_norm(x, r, w, EPS)
    torch.testing.assert_close(total, x + r)
    check(y, plain(total, w), exact(total, w))


def test_references_are_torch():
    x, w, b = torch.randn(4, 96), torch.randn(96), torch.randn(96)
    torch.testing.assert_close(rms_norm_reference(x, w, 0.1), F.rms_norm(x, (96,), w, 0.1))
    torch.testing.assert_close(rms_norm_reference(x, w, 0.1, 1.0), F.rms_norm(x, (96,), w + 1, 0.1))
    torch.testing.assert_close(
        layer_norm_reference(x, w, b, 0.1), F.layer_norm(x, (96,), w, b, 0.1)
    )
    y, total = add_rms_norm_reference(x, 2 * x, w, 0.1)
    torch.testing.assert_close(total, 3 * x)
    torch.testing.assert_close(y, F.rms_norm(3 * x, (96,), w, 0.1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(shape, dtype, device):
    x = rows_of_mixed_scale(shape, device, dtype)
    w = torch.randn(shape[-1], device=device, dtype=dtype)
    check(rms_norm(x, w, EPS), plain(x, w), exact(x, w))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(shape, dtype, device):
    x, r = (rows_of_mixed_scale(shape, device, dtype) for _ in range(2))
    w = torch.randn(shape[-1], device=device, dtype=dtype)
    y, total = add_rms_norm(x, r, w, EPS)
    torch.testing.assert_close(total, (x.float() + r.float()).to(dtype), rtol=0, atol=0)
    check(y, plain(total, w), exact(total, w))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(shape, dtype, device):
    x = rows_of_mixed_scale(shape, device, dtype)
    w, b = (torch.randn(shape[-1], device=device, dtype=dtype) for _ in range(2))
    check(
        layer_norm(x, w, b, EPS),
        F.layer_norm(x, w.shape, w, b, EPS),
        layer_norm_reference(x.float(), w.float(), b.float(), EPS),
    )


@pytest.mark.parametrize("n", [100, LONG])
def test_a_mean_far_from_zero_does_not_cancel(n, device):
    """With E[x²] − E[x]² nothing would be left of a variance a millionth of the mean squared."""
    x = torch.randn(2, n, device=device) + 3000
    truth = F.layer_norm(x.double(), (n,), eps=1e-5)
    torch.testing.assert_close(layer_norm(x, None, None).double(), truth, rtol=0, atol=5e-3)


@pytest.mark.parametrize("n", [100, LONG])
def test_weight_offset(n, device):
    x = rows_of_mixed_scale((3, n), device, torch.bfloat16)
    w, b = (torch.randn(n, device=device, dtype=torch.bfloat16) for _ in range(2))
    like = plain(x, w + 1)
    check(rms_norm(x, w, EPS, weight_offset=1.0), like, exact(x, w, offset=1.0))
    y, total = add_rms_norm(x, x, w, EPS, weight_offset=1.0)
    check(y, plain(total, w + 1), exact(total, w, offset=1.0))
    check(
        layer_norm(x, w, b, EPS, weight_offset=1.0),
        F.layer_norm(x, w.shape, w + 1, b, EPS),
        layer_norm_reference(x.float(), w.float(), b.float(), EPS, 1.0),
    )


@pytest.mark.parametrize("n", [100, LONG])
def test_without_weight_or_bias(n, device):
    x = rows_of_mixed_scale((3, n), device, torch.float16)
    w, b = (torch.randn(n, device=device, dtype=torch.float16) for _ in range(2))
    check(rms_norm(x, None, EPS), plain(x, None), exact(x, None))
    for weight, bias in ((w, None), (None, b), (None, None)):
        check(
            layer_norm(x, weight, bias, EPS),
            F.layer_norm(x, w.shape, weight, bias, EPS),
            layer_norm_reference(x.float(), weight, bias, EPS),
        )


def test_float32_weight_of_a_bfloat16_row(device):
    x, w = rows_of_mixed_scale((4, 96), device, torch.bfloat16), torch.randn(96, device=device)
    check(rms_norm(x, w, EPS), plain(x.float(), w).to(x.dtype), exact(x, w))


VIEWS = {
    "heads of a fused projection": lambda x: x[:, 24:96].unflatten(1, (3, 24)),
    "heads of one token": lambda x: x[:1, 24:96].unflatten(1, (3, 24)),
    "rows of wider rows": lambda x: x[:, 7:71],
    "every second row": lambda x: x[::2],
    "three strides": lambda x: x.view(3, 2, 3, 2, 20)[:, :, ::2, ::2],
    "transposed": lambda x: x.T,
    "expanded": lambda x: x[:1].expand(5, 120),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_input(view, device):
    storage = rows_of_mixed_scale((6, 120), device, torch.bfloat16)
    x = VIEWS[view](storage)
    before = storage.clone()
    w = torch.randn(x.shape[-1], device=device, dtype=torch.bfloat16)
    y = rms_norm(x, w, EPS)
    assert y.is_contiguous()
    check(y, plain(x.contiguous(), w), exact(x.contiguous(), w))
    y, total = add_rms_norm(x, x.transpose(0, 1).contiguous().transpose(0, 1), w, EPS)
    assert y.is_contiguous() and total.is_contiguous()
    torch.testing.assert_close(total, x + x, rtol=0, atol=0)
    check(y, plain(total, w), exact(total, w))
    torch.testing.assert_close(storage, before, rtol=0, atol=0)


def test_rows_are_read_where_they_lie():
    qkv = torch.randn(5, 20 * 8)
    heads = qkv[:, 16:64].unflatten(1, (6, 8))
    assert as_rows(heads) == (heads, 6, 160, 8)
    assert as_rows(qkv) == (qkv, 1, 160, 0)
    assert as_rows(qkv[:, :8])[1:] == (1, 160, 0)
    assert as_rows(heads[:1])[1:] == (1, 8, 0)


def test_no_rows(device):
    w = torch.ones(64, device=device)
    assert rms_norm(torch.empty(0, 64, device=device), w).shape == (0, 64)
    assert layer_norm(torch.empty(2, 0, 64, device=device), w, w).shape == (2, 0, 64)
    y, total = add_rms_norm(torch.empty(0, 64, device=device), torch.empty(0, 64, device=device), w)
    assert y.shape == total.shape == (0, 64)


@pytest.mark.parametrize("run", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_the_kernel_ran_and_not_its_reference(run, device, monkeypatch):
    short = record_launches(monkeypatch, norm, "_norm_kernel")
    long = record_launches(monkeypatch, norm, "_norm_loop_kernel")
    for n in (64, LONG):
        x, w = torch.randn(40, n, device=device), torch.randn(n, device=device)
        second = {"rms_norm": (w,), "add_rms_norm": (x, w), "layer_norm": (w, w)}[run]
        getattr(norm, run)(x, *second)
    rows_per_program = default_config(64, 4)[0]
    assert short == [(-(-40 // rows_per_program),)]
    assert long == [(40,)]


def test_bad_input_is_refused(device):
    x, w = torch.randn(2, 64, device=device), torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"weight must have shape \(64\), got \(32,\)"):
        rms_norm(x, w[:32])
    with pytest.raises(ValueError, match=r"bias must have shape \(64\), got \(1, 64\)"):
        layer_norm(x, w, w[None])
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 64\), got \(1, 64\)"):
        add_rms_norm(x, x[:1], w)
    with pytest.raises(TypeError, match="residual must be float32, got float16"):
        add_rms_norm(x, x.half(), w)
    with pytest.raises(TypeError, match="x must be float32 or float16 or bfloat16, got int64"):
        rms_norm(x.long(), w)
    with pytest.raises(TypeError, match=r"weight must be .*, got float64"):
        rms_norm(x, w.double())
    with pytest.raises(ValueError, match="weight must have stride 1"):
        rms_norm(x, torch.ones(128, device=device)[::2])
    with pytest.raises(ValueError, match="weight must be on"):
        rms_norm(x, w.to("meta"))
    with pytest.raises(ValueError, match="x must have a last dimension"):
        rms_norm(x[:, :0], w[:0])


def test_registration(device):
    x, w = torch.randn(4, 64, device=device), torch.randn(64, device=device)
    torch.library.opcheck(torch.ops.tlk.rms_norm.default, (x.T[:, 1:].T, w, 1e-6, 1.0))
    torch.library.opcheck(torch.ops.tlk.add_rms_norm.default, (x, x.clone(), w))
    torch.library.opcheck(torch.ops.tlk.layer_norm.default, (x, w, None))

    def block(x, w):
        y, total = add_rms_norm(rms_norm(x, w, weight_offset=1.0), x, w)
        return layer_norm(y + total, w, None)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, w), block(x, w))
