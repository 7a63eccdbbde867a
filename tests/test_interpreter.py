"""The interpreter against torch, which rounds as the hardware does, and against what a GPU refuses.

These tests run on a CPU also where a GPU is: they are about the interpreter.
"""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpreterError

from tests.interpreter import interpret, late
from tlk.kernels._device import sm
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels.aot import dry_run

HALVES = [torch.float16, torch.bfloat16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(autouse=True)
def interpreted():
    with interpret():
        yield


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _dependent_kernel(x_ptr, y_ptr, EARLY: tl.constexpr, PDL: tl.constexpr):
    """y = x; `EARLY` names what happens before the wait."""
    allow_next(PDL)
    at = y_ptr + tl.program_id(0)
    x = tl.load(x_ptr)
    if EARLY == "write":
        tl.store(at, x)
    if EARLY != "exit" or tl.program_id(0) == 0:
        wait_for_previous(PDL)
        if EARLY != "read":
            x = tl.load(x_ptr)
        tl.store(at, x)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, _twice(x) * y)
    tl.store(out_ptr + BLOCK + i, tl.where(x > y, x, -y))
    tl.store(out_ptr + 2 * BLOCK + i, tl.maximum(tl.abs(x), y))
    tl.store(out_ptr + 3 * BLOCK + i, tl.fma(x, y, x))
    tl.store(out_ptr + 4 * BLOCK + i, i.to(x.dtype))
    tl.store(out_ptr + 5 * BLOCK + i, x * 0.1)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, index_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr, tl.sum(x, 0))
    tl.store(out_ptr + 1, tl.max(x, 0))
    tl.store(out_ptr + 2, x.min(0))
    tl.store(index_ptr, tl.argmax(x, 0))
    tl.store(out_ptr + 3 + i, tl.cumsum(x, 0))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + k[:, None] * N + n[None, :])
    acc = tl.full((M, N), 1, out_ptr.dtype.element_ty)
    acc = tl.dot(x, y, acc, input_precision="ieee", out_dtype=out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + i * 0, tl.load(x_ptr + i), mask=i < n)


@triton.jit
def _math_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, libdevice.tanh(x))
    tl.store(out_ptr + BLOCK + i, tl.erf(x))
    tl.store(out_ptr + 2 * BLOCK + i, tl.math.exp2(x))
    tl.store(out_ptr + 3 * BLOCK + i, libdevice.fast_logf(tl.abs(x)))
    tl.store(out_ptr + 4 * BLOCK + i, tl.rsqrt(tl.abs(x)))


@triton.jit
def _loop_kernel(x_ptr, out_ptr, n, flag, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i, mask=i < n, other=0.0)
    if flag:
        total = -total
    tl.store(out_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def _gather_kernel(pointers_ptr, out_ptr):
    x_ptr = tl.load(pointers_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr))


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(x.numel() // 256,)](x, y, 256)
    return y


def same(actual, expected):
    """Equal bit for bit, whatever the bits of a NaN."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert (actual.float().signbit() == expected.float().signbit())[~expected.isnan()].all()


def floats_at_every_exponent():
    """Both halves of each bf16 interval, ties, denormals, infinities, NaNs: 2¹⁸ float32 patterns."""
    top = torch.arange(1 << 16, dtype=torch.int64) << 16
    low = torch.tensor([0, 0x7FFF, 0x8000, 0x8001])
    return (top[:, None] + low).flatten().to(torch.uint32).view(torch.float32)


def test_every_rounding_to_bf16():
    x = floats_at_every_exponent()
    same(cast(x, torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_widens(dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    same(cast(x, torch.float32), x.float())


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, *HALVES], ids=str)
def test_every_fp8_number_there_and_back(dtype, wide):
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    same(cast(x, wide), x.to(wide))
    finite = x.float().isfinite()
    back = cast(x.to(wide), dtype)
    assert (back.view(torch.uint8) == x.view(torch.uint8))[finite].all()


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_rounding_to_fp8(dtype):
    largest = torch.finfo(dtype).max
    x = floats_at_every_exponent()[::16].contiguous()  # 2¹⁴ values, ties among them
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort().values
    ties = torch.cat([(codes[1:] + codes[:-1]) / 2, torch.zeros(512 - len(codes) + 1)])
    for values in (x, ties):
        # torch overflows to NaN or infinity where the hardware's satfinite stays at the largest
        expected = values.clamp(-largest, largest).to(dtype)
        same(cast(values, dtype).float(), expected.float())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_arithmetic(dtype):
    x, y = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    out = torch.empty(6, 64, dtype=dtype)
    _arithmetic_kernel[(1,)](x, y, out, 64)
    same(out[0], (x + x) * y)
    same(out[1], torch.where(x > y, x, -y))
    same(out[2], torch.maximum(x.abs(), y))
    torch.testing.assert_close(out[3], (x.double() * y.double() + x.double()).to(dtype))
    same(out[4], torch.arange(64).to(dtype))
    torch.testing.assert_close(out[5], x * 0.1)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_reductions(dtype):
    x = torch.randn(64).to(dtype)
    out, index = torch.empty(67, dtype=dtype), torch.empty(1, dtype=torch.int32)
    _reduce_kernel[(1,)](x, out, index, 64)
    torch.testing.assert_close(out[0], x.sum())
    same(out[1], x.max())
    same(out[2], x.min())
    assert index.item() == x.argmax().item()
    torch.testing.assert_close(out[3:].float(), x.float().cumsum(0), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, *FP8], ids=str)
def test_dot(dtype):
    x, y = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](x, y, out, 16, 16, 32)
    torch.testing.assert_close(out, x.float() @ y.float() + 1)


def test_dot_of_integers_is_exact():
    x, y = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((16, 32), (32, 16)))
    out = torch.empty(16, 16, dtype=torch.int32)
    _dot_kernel[(1,)](x, y, out, 16, 16, 32)
    assert (out == (x.long() @ y.long()) + 1).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_dots_are_refused_as_by_the_compiler(dtype):
    x = torch.ones(16 * 16, dtype=dtype)
    with pytest.raises(InterpreterError, match="K >= 16"):
        _dot_kernel[(1,)](x, x, torch.empty(16, 16), 16, 16, 8)
    with pytest.raises(InterpreterError, match="K >= 32"):
        _dot_kernel[(1,)](*[x.to(torch.float8_e5m2)] * 2, torch.empty(16, 16), 16, 16, 16)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.int32], ids=str)
def test_atomic_adds_to_one_address(dtype):
    x = torch.arange(1, 33).to(dtype)
    out = torch.zeros(1, dtype=dtype)
    _atomic_kernel[(1,)](x, out, 20, 32)
    assert out.item() == sum(range(1, 21))


def test_functions():
    x = torch.randn(64)
    out = torch.empty(5, 64)
    _math_kernel[(1,)](x, out, 64)
    expected = [x.tanh(), x.erf(), x.exp2(), x.abs().log(), x.abs().rsqrt()]
    torch.testing.assert_close(out, torch.stack(expected))


def test_infinities_are_silent():
    x = torch.zeros(64)
    out = torch.empty(5, 64)
    _math_kernel[(1,)](x, out, 64)  # warnings are errors here
    assert (out[3] == -torch.inf).all() and (out[4] == torch.inf).all()


@pytest.mark.parametrize("flag", [False, True])
def test_loops_with_runtime_bounds_and_bools(flag):
    x, out = torch.randn(70), torch.empty(16)
    _loop_kernel[(1,)](x, out, 70, flag, 16)
    expected = torch.nn.functional.pad(x, (0, 10)).view(5, 16).sum(0)
    torch.testing.assert_close(out, -expected if flag else expected)


def test_out_of_bounds_names_the_program():
    x, y = torch.zeros(2 * 256 + 1), torch.zeros(3 * 256)
    with pytest.raises(InterpreterError, match=r"program \(2, 0, 0\): 255 of 256 lanes"):
        _cast_kernel[(3,)](x, y, 256)
    with pytest.raises(InterpreterError, match=r"program \(2, 0, 0\): 256 of 256 lanes"):
        _cast_kernel[(3,)](y, torch.zeros(2 * 256), 256)
    with pytest.raises(InterpreterError, match="out-of-bounds"):
        _atomic_kernel[(1,)](x, torch.zeros(1)[:0].clone(), 2, 32)


def test_views_may_reach_their_whole_storage():
    x = torch.arange(512.0)
    _cast_kernel[(1,)](x[256:], y := torch.empty(256), 256)
    same(y, x[256:])


def test_pointers_in_memory_need_to_be_allowed():
    x = torch.randn(2)
    pointers = torch.tensor([x[0].data_ptr(), x[1].data_ptr()])
    out = torch.empty(2)
    with pytest.raises(InterpreterError, match="out-of-bounds"):
        _gather_kernel[(2,)](pointers, out)


def test_dependent_launches_exist_from_sm_90_on():
    for capability, there in ((75, False), (89, False), (90, True), (120, True)):
        with interpret(capability):
            assert pdl(torch.device("cpu")) == there


@pytest.mark.parametrize("early", ["write", "exit"])
def test_a_dependent_program_waits_before_it_writes_or_ends(early):
    x, y = torch.ones(1), torch.zeros(2)
    message = "wrote before gdc_wait" if early == "write" else "ended before gdc_wait"
    with pytest.raises((RuntimeError, InterpreterError), match=message):
        _dependent_kernel[(2,)](x, y, early, True, launch_pdl=True)
    _dependent_kernel[(2,)](x, y, early, False)  # an ordinary launch has nothing to wait for
    assert y[0] == 1


def test_what_earlier_kernels_bring_is_there_after_the_wait_only():
    x, y = torch.ones(1), torch.zeros(2)
    for early, there in ((None, True), ("read", False)):
        with late(x):
            _dependent_kernel[(2,)](x, y, early, True, launch_pdl=True)
        assert y.isfinite().tolist() == [there, there] and x == 1
    with late(x):
        _dependent_kernel[(2,)](x, y, "read", False)
    assert y.isfinite().all()


def test_the_language_is_given_back():
    x, y = torch.randn(256), torch.empty(256)
    before = tl.load
    with interpret(sm=75):  # within the fixture's block: only the capability changes
        assert sm(x.device) == 75 and tl.load is before
    assert sm(x.device) == 90
    _cast_kernel[(1,)](x, y, 256)
    same(y, x)


class TestSwitching:
    """The same kernel interpreted, compiled and interpreted again."""

    @pytest.fixture(autouse=True)
    def interpreted(self):
        """Not here: these tests enter and leave the interpreter themselves."""

    def test_a_kernel_is_interpreted_and_compiled(self):
        x, y = torch.randn(64), torch.randn(64)
        out = torch.empty(6, 64)
        for _ in range(2):
            with interpret():
                _arithmetic_kernel[(1,)](x, y, out, 64)
            same(out[0], (x + x) * y)
            with dry_run(80) as launches:
                _arithmetic_kernel[(1,)](x, y, out, 64)
            assert launches[0].compiled.asm["cubin"]
            out.zero_()

    def test_the_language_is_restored(self):
        before = tl.load, tl.sum, tl.tensor.__add__, triton.knobs.runtime.interpret
        with pytest.raises(KeyError), interpret():
            assert tl.load is not before[0]
            raise KeyError
        assert before == (tl.load, tl.sum, tl.tensor.__add__, triton.knobs.runtime.interpret)

    def test_bounds_may_go_unchecked_and_pointers_be_allowed(self):
        x, out = torch.randn(2), torch.empty(2)
        pointers = torch.tensor([x[0].data_ptr(), x[1].data_ptr()])
        for options in ({"allow": (x,)}, {"check_bounds": False}):
            with interpret(**options):
                _gather_kernel[(2,)](pointers, out)
            same(out, x)
            out.zero_()
