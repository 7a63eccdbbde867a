"""What a machine without a GPU can see of the kernel, and what it computes where it can run."""

from importlib import import_module

import pytest
import torch
import triton

from tests.interpreter import interpret
from tests.kernels.check import check
from tests.kernels.test_flash_attention import compare, cumulative, exact, plain, qkv
from tlk.kernels import flash_attention_sm90
from tlk.kernels._op import count_ops
from tlk.kernels.aot import _cuobjdump, _instructions, dry_run, isolated, measure
from tlk.kernels.flash_attention import flash_attention, gluon_missing, portable_reason
from tlk.kernels.flash_attention_sm90 import (
    Config,
    _grid,
    _turned,
    default_config,
    launch,
    missing,
    refused,
)

module = import_module("tlk.kernels.flash_attention")
FP8 = torch.float8_e4m3fn
needs_gluon = pytest.mark.skipif(
    not triton.__version__.startswith(("3.6.", "3.7.", "3.8.")),
    reason="needs triton 3.6 to 3.8, in whose Gluon the kernel is written",
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or missing() is not None,
    reason="needs a GPU of sm_90 and triton 3.6: no interpreter runs Gluon",
)


def tensors(d=128, dv=None, dtype=torch.bfloat16, sq=4096, sk=4096, device="cpu"):
    shapes = ((1, sq, 32, d), (1, sk, 8, d), (1, sk, 8, dv or d))
    return tuple(torch.empty(*shape, dtype=dtype, device=device) for shape in shapes)


def why(q, k, v, window=0, softcap=0.0, sinks=None, cu=None, sm=90):
    with interpret(sm=sm):
        return portable_reason(q, k, v, window, softcap, sinks, cu, q.shape[-3])


@pytest.fixture
def able(monkeypatch):
    """As with the Triton that the kernel is written for."""
    monkeypatch.setattr(flash_attention_sm90, "missing", lambda: None)


@needs_gluon
@pytest.mark.parametrize(
    "d, dv, dtype, causal, varlen",
    [
        (64, 64, torch.float16, False, False),
        (192, 128, torch.bfloat16, True, False),
        (128, 128, torch.bfloat16, False, True),
        (256, 256, torch.bfloat16, True, True),
        (128, 128, FP8, True, False),
    ],
)
def test_its_code(d, dv, dtype, causal, varlen, able):
    """Compiled for sm_90: wgmma, its operands by TMA, no spills.

    The assembler waits after every wgmma if it sees registers of one written while it runs.
    """

    def compile_it():
        q, k, v = tensors(d, dv, dtype)
        with dry_run(90) as launches:
            if varlen:
                cu = torch.tensor([0, 4096], dtype=torch.int32)
                out = torch.empty(4096, 32, dv, dtype=dtype)
                launch(out, q[0], k[0], v[0], 0.1, causal, cu, cu, 4096, 4096)
            else:
                flash_attention(q, k, v, causal=causal)
        last = launches[-1]
        asm = last.compiled.asm
        opcodes = [x.opcode for x in _instructions(_cuobjdump(asm["cubin"], "-sass"))]
        matmuls = sum("GMMA" in opcode for opcode in opcodes)
        waits = sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes)
        tma = "cp.async.bulk.tensor" in asm["ptx"]
        return last.kernel, last.grid, matmuls, waits, tma, measure(last.compiled)

    kernel, grid, matmuls, waits, tma, metrics = isolated(compile_it)
    assert kernel == "_flash_attention_sm90_kernel"
    assert grid == (132 if causal == varlen else 34 * 32 if varlen else 32 * 32, 1, 1)
    assert tma and matmuls >= 3 * waits > 0
    assert metrics.local_in_loop == 0 and metrics.spill_bytes <= 64
    assert metrics.shared <= 227 * 1024
    # All warps together take the registers of the SM, before they are shared out anew.
    assert metrics.registers == (128 if d == 64 else 168)


@pytest.mark.parametrize(
    "itemsize, d, dv", [(2, 64, 64), (2, 128, 128), (2, 256, 128), (1, 128, 64)]
)
def test_registers_of_all_warps_fit_the_multiprocessor(itemsize, d, dv):
    config = default_config(itemsize, d, dv)
    assert 128 * (config.consumers * config.registers + config.producer_registers) <= 65536
    assert config.registers % 8 == config.producer_registers % 8 == 0


def test_the_grid_has_room_for_every_row_and_little_more():
    """Sequence s begins with block cu[s] // size + s: none begins before the one before it ends."""
    config = Config()
    for lengths in ([8192, *[128] * 31], [1] * 200, [0, 0, 129], [127, 1, 128, 129], [4096], []):
        size, starts = 128, [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        first = [start // size + s for s, start in enumerate(starts)]
        rows = starts[-1] + 77  # some of no sequence
        needed = [-(-n // size) for n in (*lengths, 77)]
        blocks, _ = _grid(config, rows, len(lengths), 1, True, True)
        assert all(a + n <= b for a, n, b in zip(first, needed, [*first[1:], blocks], strict=True))
        assert blocks <= sum(needed) + len(lengths) + 1
    assert _grid(config, 300, 5, 4, False, False) == (3 * 5 * 4, True)
    assert _grid(config, 300, 5, 4, True, False) == (3 * 5 * 4, False)
    assert _grid(config, 3000, 5, 4, False, True) == ((23 + 6) * 4, False)
    assert _grid(config, 2560, 5, 4, False, True)[1] and _grid(config, 3000, 5, 4, True, True)[1]


def test_it_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(flash_attention_sm90, "TRITON", (triton.__version__,))
    assert missing() is None
    with interpret():
        assert missing() == "Triton's interpreter has no Gluon"
    monkeypatch.setattr(flash_attention_sm90, "TRITON", ("1.0.",))
    assert missing() == f"the kernel is untested with Gluon of triton {triton.__version__}"


def test_another_gluon_leaves_the_portable_kernel(monkeypatch):
    monkeypatch.setattr(module, "hopper", None)
    monkeypatch.setattr(module, "_import_error", "no tma", raising=False)
    assert gluon_missing() == f"triton {triton.__version__} has another Gluon: no tma"
    assert why(*tensors()) == gluon_missing()


def test_it_is_chosen_where_it_is_faster(able):
    assert why(*tensors()) is None
    assert why(*tensors(d=72)) is None and why(*tensors(192, 128)) is None
    assert why(*tensors(sq=65)) is None
    assert why(*tensors(sq=64)) == "at most 64 queries"
    assert why(*tensors(), sm=100) == "the other kernel is for sm_90, this is sm_100"
    for option in ({"window": 5}, {"softcap": 2.0}, {"sinks": torch.zeros(32)}):
        assert why(*tensors(), **option).startswith("windows")
    with interpret(sm=90), count_ops() as counts:
        flash_attention(*[torch.zeros(1, 70, 2, 16)] * 3)
    assert counts == {"flash_attention[triton]": 1}


def test_what_it_refuses():
    assert refused(*tensors(), varlen=True) is None
    assert refused(*tensors(128, 64), varlen=False) is None
    assert "heads of 64 and 256" in refused(*tensors(64, 256), varlen=False)
    assert refused(*tensors(dtype=torch.float32), varlen=False) == "float32 has no fast matmul"
    assert refused(*tensors(dtype=FP8), varlen=False) is None
    assert "lengths" in refused(*tensors(dtype=FP8), varlen=True)
    assert "heads of 192" in refused(*tensors(192, 128, FP8), varlen=False)
    assert refused(*tensors(sk=0), varlen=False) == "there are no keys"
    assert "k in steps" in refused(tensors()[0], tensors(136)[1][..., 4:132], tensors()[2], False)
    q, k, v = tensors(d=20)
    assert "q in steps" in refused(q, k, v, varlen=False)
    q, k, v = tensors()
    assert "v in steps" in refused(q, k, v.new_zeros(1, 1, 8, 128).expand(1, 4096, 8, 128), False)
    assert refused(q, k, v[:, :1].expand(1, 1, 8, 128), varlen=False) is None


def test_turned_values(device):
    """Every sixteen keys in the order in which a matmul's threads hold weights, behind the last 0."""
    v = torch.randn(2, 37, 3, 24, device=device).to(FP8)[:, :, 1:]
    boxes = _turned(v, 128, 64)
    turned = boxes.base.float()
    assert turned.shape == (2, 2, 24, 48) and boxes.block_shape == [1, 1, 64, 128]
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    want = torch.zeros(2, 2, 24, 48, device=device)
    want[..., :37] = v.float().permute(0, 2, 3, 1)
    keys = torch.tensor([16 * i + j for i in range(3) for j in order], device=device)
    torch.testing.assert_close(turned, want[..., keys], rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "d, dv", [(64, 64), (128, 128), (256, 256), (72, 72), (96, 96), (192, 128)]
)
def test_it_computes_attention(d, dv, causal):
    for sq, sk, batch in ((200, 333, 2), (333, 200, 1), (129, 129, 2), (700, 650, 20)):
        q, k, v = qkv("cuda", torch.bfloat16, sq, sk, heads=4, d=d, dv=dv, batch=batch)
        with count_ops() as counts:
            compare(q, k, v, causal=causal)
        assert counts == {"flash_attention[gluon]": 1}


@needs_gpu
def test_rows_among_others():
    fused = torch.randn(2, 300, 8 * 128, device="cuda", dtype=torch.float16)
    q, k, v = (x.unflatten(-1, (-1, 128)) for x in fused.split([512, 256, 256], -1))
    compare(q, k, v, causal=True)


LENGTHS = {  # of queries and keys; few rows a sequence stay with a program, many do not
    "short": ([0, 333, 1, 640, 129, 70, 192, 0], [5, 500, 700, 640, 0, 300, 191, 0]),
    "long": ([1500, 1, 700], [1400, 70, 900]),
    "one": ([200], [300]),
}


@needs_gpu
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "d, dv", [(64, 64), (128, 128), (256, 256), (72, 72), (192, 128), (128, 64), (64, 128)]
)
def test_sequences_of_different_lengths(d, dv, causal, lengths):
    """The NaNs of a sequence stay in it, and rows behind the last are 0."""
    lengths_q, lengths_k = lengths
    q, k, v = (
        torch.randn(sum(n) + 150, heads, size, device="cuda", dtype=torch.bfloat16)
        for n, heads, size in ((lengths_q, 4, d), (lengths_k, 2, d), (lengths_k, 2, dv))
    )
    cu_q, cu_k = cumulative(lengths_q, "cuda"), cumulative(lengths_k, "cuda")
    for x in (k, v):
        x[sum(lengths_k) :] = torch.nan
        for s, n in enumerate(lengths_q):
            if n == 1:
                x[cu_k[s] : cu_k[s + 1]] = torch.nan
    ends = {"max_q": max(lengths_q), "max_k": max(lengths_k)}
    with count_ops() as counts:
        out = flash_attention(q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **ends)
    assert counts == {"flash_attention[gluon]": 1}
    assert (out[sum(lengths_q) :] == 0).all()
    for s, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        if n > 1:
            rows, keys = slice(cu_q[s], cu_q[s] + n), slice(cu_k[s], cu_k[s] + m)
            part = (q[None, rows], k[None, keys], v[None, keys])
            check(out[None, rows], plain(*part, causal=causal), exact(*part, causal=causal))


@needs_gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_8_bits(d, causal):
    """Weights are rounded to 8 bits: 2^-4 of each, and little of their sum."""
    q, k, v = (x.to(FP8) for x in qkv("cuda", sq=700, sk=650, d=d, dv=d, batch=2))
    scales = (
        torch.rand(4, device="cuda"),
        torch.rand(2, device="cuda"),
        torch.rand(1, device="cuda"),
    )
    out = flash_attention(
        q, k, v, causal=causal, q_scale=scales[0], k_scale=scales[1], v_scale=scales[2]
    )
    real = (x.double() * s[:, None] for x, s in zip((q, k, v), scales, strict=True))
    want = plain(*real, causal=causal)
    assert out.dtype == torch.bfloat16
    assert (out - want).norm() < 0.03 * want.norm()


@needs_gpu
def test_a_program_takes_many_blocks_of_any_config():
    q, k, v = qkv("cuda", torch.bfloat16, 700, 700, heads=32, kv_heads=8, d=128, dv=128, batch=2)
    for config in (Config(), Config(stages=1), Config(block_n=64, stages=3, shared=True)):
        out = torch.empty_like(q)
        launch(out, q, k, v, 0.1, True, None, None, 700, 700, config=config)
        options = {"causal": True, "softmax_scale": 0.1}
        check(out, plain(q, k, v, **options), exact(q, k, v, **options))
