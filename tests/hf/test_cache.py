"""PagedCache against transformers' DynamicCache: the same keys and values, whatever is done to it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tlk.hf.cache import PagedCache
from tlk.models.batch import PagedKV

SPEC = PagedKV(kv_heads=2, k_dim=8, v_dim=4, dtype=torch.float32, page_size=4)
LAYERS = 3


def both():
    return PagedCache([SPEC] * LAYERS, torch.device("cpu")), DynamicCache()


def grow(caches, tokens, batch=3):
    """Append the same random tokens to every cache; returns what the last update returned."""
    out = []
    for layer in range(LAYERS):
        k, v = torch.randn(batch, 2, tokens, 8), torch.randn(batch, 2, tokens, 4)
        out = [cache.update(k, v, layer) for cache in caches]
    for ours, theirs in zip(*out, strict=True):
        assert torch.equal(ours, theirs)


def same(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (4, 4), (7, 1, 30, 2)], ids=str)
def test_updates_across_pages_and_growths(chunks):
    ours, theirs = both()
    for tokens in chunks:
        assert ours.get_mask_sizes(tokens, 0) == theirs.get_mask_sizes(tokens, 0)
        grow((ours, theirs), tokens)
        same(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.reorder_cache(torch.tensor([2, 2, 0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([1])),
        lambda c: c.crop(-2),
        lambda c: c.crop(0),
    ],
    ids=["reorder", "repeat", "select", "crop", "crop nothing"],
)
def test_surgery(change):
    ours, theirs = both()
    grow((ours, theirs), 6)
    change(ours)
    change(theirs)
    same(ours, theirs)
    grow((ours, theirs), 5, batch=ours.batch_size)
    same(ours, theirs)


def test_crop_to_a_length_keeps_the_first_tokens():
    ours, _ = both()
    grow((ours, DynamicCache()), 6)
    first = ours.layers[0].keys[:, :, :4]
    ours.crop(4)
    assert ours.get_seq_length() == 4 and torch.equal(ours.layers[0].keys, first)
    ours.crop(50)
    assert ours.get_seq_length() == 4


def test_deep_copies_and_resets():
    ours, theirs = both()
    grow((ours, theirs), 6)
    other = copy.deepcopy(ours)
    grow((ours, theirs), 1)
    same(ours, theirs)
    assert other.get_seq_length() == 6
    other.reset()
    again = DynamicCache()
    grow((other, again), 3)
    same(other, again)


def test_padding_takes_no_slot_and_reads_as_zero():
    ours, theirs = both()
    new = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    ours.expect(new)
    k, v = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 4)
    keys, values = ours.update(k, v, 0)
    hidden = ~new[:, None, :, None]
    assert torch.equal(keys, k.masked_fill(hidden, 0))
    assert torch.equal(values, v.masked_fill(hidden, 0))
    assert ours.seq_lens.tolist() == [3, 5, 0]
    ours.crop(-2)
    assert ours.seq_lens.tolist() == [1, 3, 0] and ours.mask.shape == (3, 3)
    del theirs


def test_slots_are_consecutive_and_skip_padding():
    ours, _ = both()
    ours.begin(2, 5)
    new = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    assert ours.capacity == 8
    assert ours.slots_of(new, 5).tolist() == [[-1, 0, 1, -1, 2], [8, 9, 10, 11, 12]]
    ours.advance(new, 5)
    assert ours.slots_of(None, 1).tolist() == [[3], [13]]


def test_another_batch_size_is_refused():
    ours, _ = both()
    grow((ours, DynamicCache()), 2)
    with pytest.raises(ValueError, match="holds 3 sequences, the input has 2"):
        ours.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 4), 0)


def test_what_transformers_asks_of_it():
    ours, _ = both()
    assert (len(ours), ours.batch_size, ours.is_initialized) == (3, -1, False)
    grow((ours, DynamicCache()), 2)
    assert (ours.batch_size, ours.is_initialized, ours.is_compileable) == (3, True, False)
    assert ours.is_sliding == [False] * 3 and ours.is_croppable and ours.get_max_length() == -1
    assert "3 sequences, 2 tokens" in repr(ours)
