import pytest
import torch

from tlk.errors import CapacityError
from tlk.models.batch import PagedKV
from tlk.runtime.memory import GIB, MemoryLedger, fit_model_len, group_page_bytes, pages_for

FULL = PagedKV(2, 8, 8, torch.float32)  # 2 heads · 16 tokens · 16 numbers · 4 bytes = 2048 a page
WINDOWED = PagedKV(2, 8, 8, torch.float32, window=40)
LAYERS = [FULL, FULL, FULL, WINDOWED]


def test_bytes_of_a_page_are_summed_over_a_groups_layers():
    assert group_page_bytes(LAYERS) == [3 * 2048, 2048]


def test_groups_share_evenly():
    assert pages_for(10 * 4 * 2048 + 5, LAYERS, 1000, 8, 64) == [10, 10]


def test_a_window_takes_no_more_than_it_can_use():
    # window 40 + chunk 64 + two pages of slack: 136 tokens are 9 pages, for one sequence
    assert pages_for(100 * 2048, LAYERS, 1000, 1, 64) == [(100 - 9) // 3, 9]


def test_nobody_takes_more_than_it_can_use():
    assert pages_for(10**12, LAYERS, 100, 3, 64) == [3 * 7, 3 * 7]
    assert pages_for(10**12, LAYERS, 1000, 3, 64) == [3 * 63, 3 * 9]


def test_the_longest_sequence_that_fits():
    assert fit_model_len(100, [7, 2], LAYERS, 5) == (100, None)
    length, notice = fit_model_len(113, [7, 2], LAYERS, GIB)
    assert length == 112
    assert (
        notice
        == "max_model_len is 112 and not 113: the KV cache of 1.00 GiB holds no longer sequence"
    )
    assert fit_model_len(1000, [3], [WINDOWED], 5) == (1000, None)


def test_no_page_at_all():
    with pytest.raises(CapacityError, match="has 7 bytes, but one page of 16 tokens takes 8,192"):
        fit_model_len(100, [0, 3], LAYERS, 7)


def test_the_ledger_names_what_it_counts():
    ledger = MemoryLedger(GIB, GIB // 2, 0, 2 * GIB, 3 * GIB)
    assert str(ledger) == (
        "memory in GiB: weights 1.00, graphs 0.50, activations 0.00, kv cache 2.00, free 3.00"
    )
    assert ledger.to_dict()["kv_cache"] == 2 * GIB
