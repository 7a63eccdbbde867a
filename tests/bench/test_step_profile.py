import time

import pytest
import torch

from tlk.bench.step_profile import CATEGORIES, category, profile_steps, summarize, table
from tlk.kernels.norm import rms_norm


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_paged_attention_kernel", "attention"),
        ("_combine_kernel", "attention"),
        ("_paged_prefill_sm90_kernel", "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwd>", "attention"),
        ("_tile_kernel", "linears"),
        ("_gemv_kernel", "linears"),
        ("nvjet_tst_128x256_64x4", "linears"),
        ("sm90_xmma_gemm_bf16bf16", "linears"),
        ("tlk::norm_linear", "linears"),
        ("_norm_kernel", "norms"),
        ("tlk::add_rms_norm", "norms"),
        ("_sample_kernel", "sampling"),
        ("_likeliest_kernel", "sampling"),
        ("_pieces_kernel", "sampling"),
        ("_top_logprobs_kernel", "sampling"),
        ("_rope_and_write_kv_kernel", "other"),
        ("Memcpy DtoH (Device -> Pinned)", "other"),
    ],
)
def test_kernels_by_what_they_do(name, kind):
    assert category(name) == kind


def test_overlapping_kernels_are_busy_once_and_the_first_has_the_time():
    spans = [
        ("_sample_kernel", 10.0, 14.0),
        ("_tile_kernel", 0.0, 6.0),
        ("_norm_kernel", 4.0, 8.0),
        ("_norm_kernel", 5.0, 6.0),
    ]
    profiled = summarize(spans, steps=2, length=10.0)
    assert profiled.busy == 6.0 and profiled.idle == 4.0 and profiled.gaps == 1.0
    assert profiled.kernels == {
        "attention": 0.0, "sampling": 2.0, "linears": 3.0, "norms": 1.0, "other": 0.0
    }  # fmt: skip
    assert list(profiled.names) == ["_tile_kernel", "_sample_kernel", "_norm_kernel"]
    values = profiled.to_dict()
    assert values["share_outside_kernels"] == 0.4
    text = table(values)
    assert "one step, 10.0 µs, on average over 2" in text
    assert "idle             4.0 µs   40.0%" in text


def test_steps_are_profiled_on_this_machine():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, w = torch.randn(64, 256, device=device), torch.ones(256, device=device)
    calls = []

    def step():
        calls.append(rms_norm(x, w))
        time.sleep(0.002)

    profiled = profile_steps(step, 5, device)
    assert len(calls) == 10 and profiled.steps == 5
    assert profiled.step > 2000 and profiled.kernels["norms"] > 0
    assert profiled.kernels["norms"] == pytest.approx(sum(profiled.kernels.values()))
    assert 0 < profiled.busy < profiled.step and set(profiled.kernels) == {n for n, _ in CATEGORIES}
