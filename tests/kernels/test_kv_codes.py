import pytest
import torch
import triton
import triton.language as tl

from tests.interpreter import interpret
from tlk.kernels._kv_codes import (
    CODES,
    as_pairs,
    check_scales,
    code_kind,
    decode,
    decode_reference,
    encode,
    encode_reference,
    readable,
    unpair,
    writable,
)

SMS = [75, 80, 89, 90]


@triton.jit
def _encode_kernel(x_ptr, codes_ptr, scale, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    codes = encode(tl.load(x_ptr + at), scale, codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + at, codes)


@triton.jit
def _decode_kernel(codes_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, decode(tl.load(codes_ptr + at)))


@triton.jit
def _unpair_kernel(pairs_ptr, y_ptr, KIND: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    first, second = unpair(tl.load(pairs_ptr + at), tl.float32, KIND)
    tl.store(y_ptr + 2 * at, first)
    tl.store(y_ptr + 2 * at + 1, second)


def all_codes(dtype, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(dtype)
    return codes[~codes.float().isnan()].repeat(2)[:256].clone()  # without the NaNs of e4m3


def run_as(sm, device, call):
    """`call()` on the GPU there is, or in the interpreter as on `sm`."""
    if device == "cuda":
        return call()
    with interpret(sm=sm):
        return call()


def all_floats(device):
    """Every finite bfloat16, and float32 numbers next to the middles between two e4m3 codes."""
    bf16 = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([middles, *(torch.nextafter(middles, x) for x in (codes[1:], codes[:-1]))])
    x = torch.cat([bf16, near, -near, torch.tensor([0.5, 1.5, 2.5, -0.5, 126.5, 127.49])])
    x = x[x.isfinite()]
    return torch.cat([x, x.new_zeros(-len(x) % 1024)]).to(device)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_encode(scale, dtype, sm, device):
    x = all_floats(device)
    want = encode_reference(x[:, None, None], torch.tensor([scale], device=device), dtype).flatten()
    codes = torch.zeros(len(x), dtype=dtype, device=device)
    grid = (len(x) // 1024,)
    run_as(sm, device, lambda: _encode_kernel[grid](x, writable(codes), scale, N=1024))
    assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_every_code_is_read_exactly(dtype, sm, device):
    codes = all_codes(dtype, device)
    single, pairs = torch.empty(256, device=device), torch.empty(256, device=device)

    def run():
        _decode_kernel[(1,)](readable(codes), single, N=256)
        kind = code_kind(codes)
        _unpair_kernel[(1,)](as_pairs(codes), pairs, KIND=kind, N=128)
        return 256.0 if kind == "e4m3_bits" else 1.0

    unit = run_as(sm, device, run)
    assert torch.equal(single, codes.float())
    assert torch.equal(pairs * unit, codes.float())


def test_references():
    """By the words of the formats: nearest even, clamped, one scale for each head."""
    x = torch.tensor([[0.26, -0.26], [1e4, -1e4], [2.5, 3.5]])
    scale = torch.tensor([0.1, 1.0, 1.0])
    codes = encode_reference(x, scale, torch.int8)
    assert codes.tolist() == [[3, -3], [127, -127], [2, 4]]
    assert encode_reference(x, scale, torch.float8_e4m3fn)[1].tolist() == [448.0, -448.0]
    pages = codes[None, :, None]
    assert torch.equal(decode_reference(pages, scale)[0, :, 0], codes.float() * scale[:, None])
    assert torch.equal(decode_reference(pages, None), pages.float())
    half = x.half()
    assert encode_reference(x, None, torch.float16).equal(half)
    assert decode_reference(half, None) is half


@pytest.mark.parametrize(
    "dtype, k, v, message",
    [
        (torch.int8, torch.ones(2), None, "v_scale must not be None, the other is not"),
        (torch.int8, torch.ones(3), torch.ones(2), r"k_scale must have shape \(2\), got \(3,\)"),
        (torch.float16, torch.ones(2), torch.ones(2), "k_scale must be None for a cache of .*16"),
        (torch.int8, torch.ones(4)[::2], torch.ones(2), "k_scale must have stride 1"),
        (torch.int8, torch.ones(2), torch.ones(2, device="meta"), "v_scale must be on cpu"),
    ],
)
def test_bad_scales_are_refused(dtype, k, v, message):
    with pytest.raises(ValueError, match=message):
        check_scales(torch.empty(1, 2, 4, 8).to(dtype), k, v)


def test_scales_are_float32():
    with pytest.raises(TypeError, match="k_scale must be float32, got float16"):
        check_scales(torch.empty(1, 2, 4, 8).to(torch.int8), torch.ones(2).half(), torch.ones(2))
