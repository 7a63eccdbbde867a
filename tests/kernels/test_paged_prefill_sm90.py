"""What a machine without a GPU can see of the kernel; `test_paged_prefill` runs it where it can run."""

import pytest
import torch
import triton

from tests.interpreter import interpret
from tests.kernels.test_paged_attention import Requests
from tlk.kernels import paged_prefill, paged_prefill_sm90
from tlk.kernels.aot import dry_run, isolated, measure
from tlk.kernels.paged_attention import paged_attention
from tlk.kernels.paged_prefill_sm90 import Config, launch, missing, takes

needs_gluon = pytest.mark.skipif(
    not triton.__version__.startswith(("3.6.", "3.7.")),
    reason="needs triton 3.6 or 3.7, whose Gluon the kernel is written in",
)


def prompt(page=16, d=128, dtype=torch.bfloat16):
    return Requests([4096], [4096], "cpu", dtype, 32, 8, d, d, page)


@needs_gluon
@pytest.mark.parametrize("page, d, boxes", [(16, 128, 32), (128, 128, 4), (64, 64, 4)])
def test_its_code(page, d, boxes, monkeypatch):
    """Compiled for sm_90: wgmma, a TMA copy a box and half, no spills to speak of."""
    monkeypatch.setattr(paged_prefill_sm90, "missing", lambda: None)

    def compile_it():
        r = prompt(page, d)
        with dry_run(90) as launches:
            paged_attention(*r.args)
        (launch,) = launches
        ptx, metrics = launch.compiled.asm["ptx"], measure(launch.compiled)
        copies = ptx.count("cp.async.bulk.tensor")
        return launch.kernel, launch.grid, "wgmma" in ptx, copies, metrics

    kernel, grid, wgmma, copies, metrics = isolated(compile_it)
    assert kernel == "_paged_prefill_sm90_kernel" and wgmma and copies == boxes
    assert grid == ((4096 * 4 // 128 + 1 + 1) * 8, 1, 1)
    assert metrics.local_in_loop == 0 and metrics.spill_bytes <= 32 and metrics.shared <= 227 * 1024
    assert metrics.registers == 168  # 12 warps of them fill the SM, before they are shared out anew


def test_pages_make_tiles_or_tiles_make_pages():
    assert [page for page in range(1, 400) if takes(page)] == [8, 16, 32, 64, 128, 256, 384]


def test_registers_of_all_warps_fit_the_multiprocessor():
    config = Config()
    assert 128 * (2 * config.registers + config.producer_registers) <= 65536
    assert config.registers % 8 == config.producer_registers % 8 == 0


def test_it_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(paged_prefill_sm90, "TRITON", (triton.__version__,))
    assert missing() is None
    with interpret():
        assert missing() == "Triton's interpreter has no Gluon"
    monkeypatch.setattr(paged_prefill_sm90, "TRITON", ("1.0.",))
    assert missing() == f"the kernel is untested with Gluon of triton {triton.__version__}"


def test_it_is_chosen_on_sm_90_alone(monkeypatch):
    monkeypatch.setattr(paged_prefill_sm90, "missing", lambda: None)

    def chosen(sm, r):
        with interpret(sm=sm):
            return paged_prefill.backend(r.q, *r.caches, 4096)

    small, large, odd = prompt(16), prompt(64), prompt(192)
    assert [chosen(90, r) for r in (small, large, odd)] == ["gluon", "gluon", "triton_tma"]
    assert [chosen(100, r) for r in (small, large)] == [None, "triton_tma"]
    assert chosen(90, prompt(16, dtype=torch.float32)) is None
    monkeypatch.setattr(paged_prefill_sm90, "missing", lambda: "a reason")
    assert [chosen(90, r) for r in (small, large)] == [None, "triton_tma"]


def test_another_gluon_leaves_the_portable_kernel(monkeypatch):
    monkeypatch.setattr(paged_prefill, "hopper", None)
    monkeypatch.setattr(paged_prefill, "_import_error", "no tma", raising=False)
    version = triton.__version__
    assert paged_prefill.gluon_missing() == f"triton {version} has another Gluon: no tma"
    r = prompt(64)
    with interpret(sm=90):
        assert paged_prefill.backend(r.q, *r.caches, 4096) == "triton_tma"


def test_no_sequence_launches_nothing():
    r = Requests([], [], padding=3, d=64, dv=64)
    out = torch.empty(3, 4, 64)
    launch(out, *r.args[:-1], 0.1)
    assert not out.any()
