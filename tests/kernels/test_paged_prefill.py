import pytest
import torch
import triton

from tests.interpreter import interpret
from tests.kernels.launches import record_launches
from tests.kernels.test_paged_attention import Requests, dense, module, verify
from tlk.kernels import paged_prefill, paged_prefill_sm90
from tlk.kernels.aot import dry_run, isolated, measure, violations
from tlk.kernels.paged_attention import paged_attention
from tlk.kernels.paged_prefill import backend, default_config

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def enough_programs(monkeypatch):
    """Batches as small as these would be left to the kernel that splits keys."""
    monkeypatch.setattr(paged_prefill, "sm_count", lambda device: 1)


@pytest.fixture(params=["triton_tma", "gluon"])
def launches(request, monkeypatch):
    """The grids of the kernel under test, which takes all that it can."""
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if request.param == "gluon":
        if gpu != (9, 0) or not triton.__version__.startswith(("3.6.", "3.7.")):
            pytest.skip("needs a GPU of sm_90 and triton 3.6 or 3.7: no interpreter runs Gluon")
        monkeypatch.setattr(paged_prefill_sm90, "missing", lambda: None)
        return record_launches(monkeypatch, paged_prefill_sm90, "_paged_prefill_sm90_kernel")
    if gpu not in (None, (9, 0), (10, 0)):
        pytest.skip("needs a GPU of sm_90 or sm_100, or an interpreter")
    monkeypatch.setattr(paged_prefill_sm90, "missing", lambda: "not under test")
    return record_launches(monkeypatch, paged_prefill, "_paged_prefill_kernel")


def chunks(queries, lengths, device, dtype=torch.bfloat16, d=64, dv=64, page=64, **options):
    return Requests(queries, lengths, device, dtype, d=d, dv=dv, page=page, **options)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("page", [64, 128, 256])
def test_prefill_chunks_and_decode_together(page, dtype, device, launches):
    lengths = [40, 7, 100, 300, 1, 0]
    r = chunks([1, 0, 100, 65, 1, 0], lengths, device, dtype, page=page, padding=70)
    assert not verify(r)[-70:].any(), "padding must be 0"
    # 237 tokens of 2 heads fill 3 tiles, 6 sequences add one each, the padding one
    assert launches == [((237 * 2 // 128 + 6 + 1) * 2,)]


@pytest.mark.parametrize("d, dv", [(64, 128), (128, 64), (128, 128)])
def test_head_dims(d, dv, device, launches):
    verify(chunks([66, 1], [130, 9], device, d=d, dv=dv))
    assert len(launches) == 1


@pytest.mark.parametrize("before", [0, 1, 62, 63, 64, 127, 128])
@pytest.mark.parametrize("queries", [64, 65])
def test_diagonal_and_end_through_the_corners_of_tiles(queries, before, device, launches):
    verify(chunks([queries], [before + queries], device))
    assert len(launches) == 1


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (14, 2), (16, 1)])
def test_groups(heads, kv_heads, device, launches):
    verify(chunks([140, 3], [150, 30], device, heads=heads, kv_heads=kv_heads))
    assert len(launches) == 1


def test_table_without_a_spare_entry(device, launches):
    """Nothing behind a full table is read; the interpreter checks every address."""
    verify(chunks([70], [128], device, spare_pages=0))
    assert len(launches) == 1


def test_a_weight_of_zero_does_not_meet_what_lies_behind_the_end(device, launches):
    r = chunks([64, 64], [70, 100], device)
    r.caches[1].nan_to_num_(nan=torch.inf)
    r.caches[0].nan_to_num_(nan=torch.inf)
    verify(r)
    assert len(launches) == 1


def test_rows_that_see_nothing_are_zero(device, launches):
    r = chunks([80, 80], [0, 2], device)
    out = paged_attention(*r.args)
    shown = out.abs().amax((1, 2)) > 0
    assert shown.tolist() == [False] * 158 + [True] * 2
    assert len(launches) == 1


@pytest.mark.parametrize("page", [16, 32, 192])
def test_other_pages(page, device, launches):
    """Tiles of several pages, which only Gluon puts together, and pages of three tiles."""
    verify(chunks([1, 0, 100, 65, 1, 0], [40, 7, 100, 300, 1, 0], device, page=page, padding=3))
    assert len(launches) <= 1


def test_scale(device, launches):
    verify(chunks([70], [90], device), scale=0.7)
    assert len(launches) == 1


def test_large_scores_do_not_overflow(device, launches):
    r = chunks([70, 1], [70, 90], device, torch.float16)
    r.q = r.q * 200
    for x in (*r.k, r.caches[0]):
        x *= 20
    out = paged_attention(*r.args, softmax_scale=0.01)
    like, exact = dense(r, r.dtype, 0.01), dense(r, torch.float64, 0.01)
    assert (out - exact).abs().max() <= 4 * (like - exact).abs().max()
    assert len(launches) == 1


def test_a_batch_gives_what_its_requests_give_alone(device, launches):
    r = chunks([66, 90], [77, 200], device)
    q, k, v, table, lens, _, _ = r.args
    together = paged_attention(*r.args)
    for s, n in enumerate(r.queries):
        rows = slice(r.cu[s], r.cu[s + 1])
        cu = torch.tensor([0, n], dtype=torch.int32, device=device)
        one = paged_attention(q[rows], k, v, table[s : s + 1], lens[s : s + 1], cu, n)
        assert torch.equal(one, together[rows])
    assert len(launches) == 3


def test_chunks_give_what_the_whole_prompt_gives(device, launches):
    r = chunks([150], [150], device)
    q, k, v, table, _, _, _ = r.args
    whole = paged_attention(*r.args)
    for begin, end in ((0, 70), (70, 150)):
        cu = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        lens = torch.tensor([end], dtype=torch.int32, device=device)
        part = paged_attention(q[begin:end], k, v, table, lens, cu, end - begin)
        assert torch.equal(part, whole[begin:end])
    assert len(launches) == 3


def test_caches_of_different_layout(device, launches):
    """K a slice of a pool of both, V with its heads outside: both are matrices of rows of D."""
    r = chunks([70, 12], [80, 33], device)
    pool = torch.stack([r.caches[0], torch.full_like(r.caches[0], torch.nan)], 1)
    r.caches[0] = pool[:, 0]
    r.caches[1] = r.caches[1].transpose(0, 1).contiguous().transpose(0, 1)
    verify(r)
    assert len(launches) == 1


def test_what_it_leaves_to_others(device):
    def runner(r, **options):
        return module._backend(*r.args, 1.0, *options.values())

    with interpret(sm=90):
        assert runner(chunks([64], [64], device)) == "triton_tma"
        assert runner(chunks([63], [64], device)) == "triton"  # rows for half a tile
        assert runner(chunks([64], [64], device, page=32)) == "triton"
        assert runner(chunks([64], [64], device, torch.float32)) == "triton"
        assert runner(chunks([64], [64], device, d=80)) == "triton"
        assert runner(chunks([64], [64], device), window=9) == "triton"
        assert runner(chunks([64], [64], device), window=0, softcap=2.0) == "triton"
        sinks = torch.ones(4, device=device)
        assert runner(chunks([64], [64], device), window=0, softcap=0.0, sinks=sinks) == "triton"
    if device == "cpu":
        for sm in (89, 120):
            with interpret(sm=sm):
                assert runner(chunks([64], [64], device)) == "triton"


def test_caches_that_are_not_aligned_are_left_to_others(device):
    r = chunks([64], [64], device)
    q, k, v = r.q, *r.caches
    assert backend(q, k, v, 64)
    shifted = torch.empty(k.numel() + 1, dtype=k.dtype, device=device)[1:].view(k.shape)
    assert not backend(q, shifted, v, 64)
    odd = torch.empty(k.shape[0], k[0].numel() + 8, dtype=k.dtype, device=device)
    assert not backend(q, k, odd[:, :-8].view(k.shape), 64)


def test_few_programs_are_left_to_the_kernel_that_splits_keys(device, monkeypatch):
    monkeypatch.setattr(paged_prefill, "sm_count", lambda device: 132)
    r = chunks([64], [64], device)
    assert not backend(r.q, *r.caches, 64)
    many = r.q.repeat(67, 1, 1)  # 67 tiles × 2 heads
    assert backend(many, *r.caches, 67 * 64)


@pytest.mark.parametrize("page", [64, 128])
def test_its_code_uses_the_tensor_memory_accelerator_and_wgmma(page, monkeypatch):
    """Compiled for sm_90, with or without a GPU."""
    monkeypatch.setattr(paged_prefill_sm90, "missing", lambda: "not under test")

    def compile_it():
        r = chunks([4096], [4096], "cpu", heads=32, kv_heads=8, d=128, dv=128, page=page)
        with dry_run(90) as launches:
            paged_attention(*r.args)
        (launch,) = launches
        ptx = launch.compiled.asm["ptx"]
        return violations(measure(launch.compiled)), "wgmma" in ptx, "cp.async.bulk.tensor" in ptx

    assert isolated(compile_it) == ([], True, True)


def test_configs_hold_whole_tiles():
    for page in (64, 128, 192, 256):
        for sm in (90, 100):
            assert page % default_config(sm, page).block_n == 0
    assert default_config(90, 256).block_n == 128
