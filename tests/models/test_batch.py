import dataclasses

import pytest
import torch

from tlk.models.batch import KVCache, PagedKV, group_specs

FULL = PagedKV(kv_heads=2, k_dim=8, v_dim=6, dtype=torch.bfloat16, page_size=4)
SLIDING = dataclasses.replace(FULL, window=16)


def test_equal_specs_share_a_group():
    specs = [FULL, SLIDING, FULL, dataclasses.replace(SLIDING)]
    assert group_specs(specs) == ([FULL, SLIDING], [0, 1, 0, 1])
    assert group_specs([SLIDING, SLIDING]) == ([SLIDING], [0, 0])


def test_every_layer_has_its_own_pages():
    cache = KVCache.allocate([FULL, SLIDING, FULL], [5, 3], "cpu")
    assert [layer.group for layer in cache.layers] == [0, 1, 0]
    assert [tuple(layer.k.shape) for layer in cache.layers] == [
        (5, 2, 4, 8),
        (3, 2, 4, 8),
        (5, 2, 4, 8),
    ]
    assert cache.layers[2].v.shape == (5, 2, 4, 6) and cache.layers[2].v.dtype == torch.bfloat16
    addresses = {t.data_ptr() for layer in cache.layers for t in (layer.k, layer.v)}
    assert len(addresses) == 6


def test_page_bytes():
    cache = KVCache.allocate([FULL], [1], "cpu")
    k, v = cache.layers[0].k, cache.layers[0].v
    assert FULL.page_bytes() == k.nbytes + v.nbytes


def test_a_wrong_number_of_pools_raises():
    with pytest.raises(ValueError, match="num_pages must name pages for 2 groups, got 1"):
        KVCache.allocate([FULL, SLIDING], [5], "cpu")
