import pytest
import torch

from tlk.hf.cache import PagedCache
from tlk.hf.call import Inexpressible, flatten
from tlk.models.batch import PagedKV

FULL = PagedKV(kv_heads=1, k_dim=4, v_dim=4, dtype=torch.float32, page_size=4)
WINDOW = PagedKV(kv_heads=1, k_dim=4, v_dim=4, dtype=torch.float32, window=3, page_size=4)


def cache():
    return PagedCache([FULL, WINDOW, FULL], torch.device("cpu"))


def call(ids, mask=None, positions=None, keep=0, into=None, windowed=False):
    mask = None if mask is None else torch.tensor(mask)
    positions = None if positions is None else torch.tensor(positions)
    into = cache() if into is None else into
    return flatten(torch.tensor(ids), None, mask, positions, keep, into, windowed=windowed)


def test_without_padding_every_token_is_a_row():
    c = call([[5, 6, 7], [8, 9, 10]])
    assert c.ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert c.batch.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert c.batch.cu_seqlens_q.tolist() == [0, 3, 6] and c.batch.seq_lens.tolist() == [3, 3]
    assert c.batch.slots[0].tolist() == [0, 1, 2, 4, 5, 6] and len(c.batch.slots) == 2
    assert c.batch.page_tables[1].tolist() == [[0], [1]]
    assert (c.batch.max_q, c.length, c.batch.logit_rows, c.padding) == (3, 3, None, None)


def test_padding_is_left_out_and_its_logits_are_zero():
    c = call([[1, 5, 6], [8, 9, 10], [1, 1, 1]], [[0, 1, 1], [1, 1, 1], [0, 0, 0]])
    assert c.ids.tolist() == [5, 6, 8, 9, 10]
    assert c.batch.positions.tolist() == [1, 2, 0, 1, 2]  # transformers counts padding
    assert c.batch.cu_seqlens_q.tolist() == [0, 2, 5, 5]
    assert c.batch.seq_lens.tolist() == [2, 3, 0]
    assert c.batch.slots[0].tolist() == [0, 1, 4, 5, 6]
    logits = torch.arange(1.0, 6)[:, None][c.batch.logit_rows]
    assert c.layout(logits)[..., 0].tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]


def test_a_mask_of_ones_is_no_mask():
    assert call([[5, 6]], [[1, 1]]).new is None


def test_the_kept_columns():
    c = call([[1, 5, 6], [8, 9, 10]], [[0, 1, 1], [1, 1, 1]], keep=2)
    assert c.batch.logit_rows.tolist() == [0, 1, 3, 4] and c.shape == (2, 2)
    c = call([[1, 5, 6], [8, 9, 10]], keep=torch.tensor([0, 2]))
    assert c.batch.logit_rows.tolist() == [0, 2, 3, 5]


def test_decode_goes_on_where_the_cache_ends():
    into = cache()
    c = call([[1, 5, 6], [8, 9, 10]], [[0, 1, 1], [1, 1, 1]], [[0, 0, 1], [0, 1, 2]], into=into)
    into.advance(c.new, 3)
    c = call([[7], [11]], [[0, 1, 1, 1], [1, 1, 1, 1]], [[2], [3]], into=into)
    assert c.batch.positions.tolist() == [2, 3] and c.length == 4
    assert c.batch.seq_lens.tolist() == [3, 4] and c.batch.slots[0].tolist() == [2, 7]


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"mask": [[[[1, 1, 1]]]]}, "4-D attention_mask"),
        ({"mask": [[1, 1]]}, r"attention_mask of shape \(1, 2\) for 0 cached and 3 new"),
        ({"mask": [[1, 0, 1]], "windowed": True}, "holes in a model with a sliding window"),
        ({"positions": [[0, 1, 0]]}, "do not count up by one"),
        ({"positions": [[[0, 1, 2]]]}, "position_ids of shape"),
        ({"positions": [[0, 1, 2], [0, 1, 2]]}, "position_ids of shape"),
        ({"keep": torch.zeros(1, 3, dtype=torch.bool)}, "logits_to_keep"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_only_the_original_can_do(kwargs, reason):
    into = cache()
    with pytest.raises(Inexpressible, match=reason):
        call([[5, 6, 7]], **kwargs, into=into)
    assert into.kv is None  # nothing has changed


def test_a_mask_that_changes_its_mind_is_refused():
    into = cache()
    c = call([[5, 6, 7]], [[0, 1, 1]], into=into)
    into.advance(c.new, 3)
    with pytest.raises(Inexpressible, match="hides or shows other cached tokens"):
        call([[8]], [[1, 1, 1, 1]], into=into)
    with pytest.raises(Inexpressible, match="no attention_mask for a cache that holds padding"):
        call([[8]], into=into)


def test_holes_are_fine_without_a_window():
    assert call([[5, 6, 7]], [[1, 0, 1]]).ids.tolist() == [5, 7]


def test_negative_positions_are_an_error():
    with pytest.raises(ValueError, match="position_ids must not be negative, got -1"):
        call([[5, 6]], positions=[[-1, 0]])
