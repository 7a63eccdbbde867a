"""Pages: ownership, keys and what stays findable."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from tlk.runtime.pages import PageGroup, PagePool, block_key, longest_prefix, root_key

KEYS = [root_key(bytes([i])) for i in range(8)]


def test_all_pages_are_given_once():
    pool = PagePool(3)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    assert pool.available == 0 and pool.owners == [1, 1, 1]
    with pytest.raises(IndexError, match="all 3 pages are owned"):
        pool.allocate()
    pool.release(1)
    assert pool.available == 1 and pool.allocate() == 1


def test_a_shared_page_lasts_until_its_last_owner_goes():
    pool = PagePool(1)
    page = pool.retain(pool.allocate())
    pool.release(page)
    assert pool.available == 0
    pool.release(page)
    assert pool.available == 1 and pool.idle == 0


def test_nothing_is_released_twice():
    pool = PagePool(2)
    pool.release(pool.allocate())
    with pytest.raises(ValueError, match="page 0 has no owner to release it"):
        pool.release(0)
    assert pool.available == 2


def test_what_is_free_can_be_neither_shared_nor_published():
    pool = PagePool(1)
    with pytest.raises(KeyError):
        pool.retain(0)
    with pytest.raises(ValueError, match="page 0 has no owner, so it cannot be published"):
        pool.publish(0, KEYS[0])


def test_a_published_page_outlives_its_owner():
    pool = PagePool(2)
    page = pool.allocate()
    pool.publish(page, KEYS[0])
    pool.release(page)
    assert pool.published == {KEYS[0]: page} and pool.idle == 1 and pool.available == 2
    assert pool.retain(page) == page and pool.idle == 0 and pool.owners[page] == 1


def test_the_page_that_lay_idle_longest_is_evicted_and_only_when_none_is_free():
    pool = PagePool(4)
    pages = [pool.allocate() for _ in range(3)]
    for page, key in zip(pages, KEYS, strict=False):
        pool.publish(page, key)
    for page in (1, 0, 2):
        pool.release(page)
    pool.release(pool.retain(1))  # used again: now the last to go
    assert pool.allocate() == 3 and len(pool.published) == 3
    assert [pool.allocate() for _ in range(3)] == [0, 2, 1]
    assert not pool.published
    pool.release(0)
    assert pool.idle == 0  # its key went with its eviction


def test_a_key_keeps_its_first_page_and_a_page_its_first_key():
    pool = PagePool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, KEYS[0])
    pool.publish(second, KEYS[0])
    pool.publish(first, KEYS[1])
    assert pool.published == {KEYS[0]: first}
    pool.release(second)
    assert pool.idle == 0 and pool.available == 1


def test_a_pool_accounts_for_every_page_whatever_happens():
    r, pool, owned = random.Random(0), PagePool(7), Counter[int]()
    for step in range(3000):
        action = r.random()
        if action < 0.4 and pool.available:
            page = pool.allocate()
            assert not owned[page]
            owned[page] += 1
        elif action < 0.5 and pool.published:
            owned[pool.retain(r.choice(list(pool.published.values())))] += 1
        elif action < 0.6 and owned:
            pool.publish(r.choice(list(owned)), root_key(bytes([step % 11])))
        elif owned:
            page = r.choice(list(owned))
            pool.release(page)
            owned[page] -= 1
        owned = +owned
        assert pool.owners == [owned[page] for page in range(7)]
        assert pool.available + len(owned) == 7
        assert len(set(pool.published.values())) == len(pool.published)


def test_a_key_depends_on_all_tokens_before_it_and_on_every_salt():
    chain = {root_key(), root_key(b""), root_key(b"a"), root_key(b"a", b"b"), root_key(b"ab", b"")}
    assert len(chain) == 5
    first = block_key(root_key(b"a"), [1, 2])
    assert first == block_key(root_key(b"a"), [1, 2]) and len(first) == 16
    others = [
        block_key(root_key(b"b"), [1, 2]),
        block_key(root_key(b"a"), [2, 1]),
        block_key(root_key(b"a"), [1, 2, 0]),
        block_key(root_key(b"a"), [1, 2**31 - 1]),
        block_key(first, [1, 2]),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_a_window_needs_the_pages_it_is_said_to_need(window, chunk, page_size):
    group = PageGroup(1000, window, page_size)
    most = 0
    for offset in range(page_size):
        table: list[int] = []
        stops = [0, *range(offset, 60, chunk)]
        for start, stop in pairwise(stops):
            group.drop_unseen(table, start)
            assert group.missing(table, start, stop) <= group.pool.available
            group.extend(table, start, stop)
            held = [i for i, page in enumerate(table) if page >= 0]
            seen = range(max(0, start - window + 1) // page_size, -(-stop // page_size))
            assert held == list(seen)
            most = max(most, len(held))
    assert most == group.pages_for(60, chunk)


@pytest.mark.parametrize(("window", "pages", "page_size"), [(1, 1, 4), (5, 3, 4), (8, 9, 1)])
def test_longest_chunk_is_what_still_fits(window, pages, page_size):
    group = PageGroup(pages, window, page_size)
    chunk = group.longest_chunk
    assert group.pages_for(1000, chunk) == pages < group.pages_for(1000, chunk + 1)


def test_full_attention_keeps_every_page():
    group = PageGroup(4, 0, 4)
    assert [group.pages_for(tokens, 1) for tokens in (1, 4, 5, 16)] == [1, 1, 2, 4]
    assert group.longest_chunk == 16
    table: list[int] = []
    group.extend(table, 0, 13)
    group.drop_unseen(table, 13)
    assert table == [0, 1, 2, 3]


def test_whoever_writes_to_a_shared_page_gets_a_copy():
    group = PageGroup(4, 0, 4)
    table: list[int] = []
    assert group.extend(table, 0, 6) == (0, None)
    other = group.share(table, 6)
    assert other == table and group.pool.owners[:2] == [2, 2]
    assert group.missing(table, 6, 7) == 1
    assert group.extend(table, 6, 7) == (1, 1)
    assert table == [0, 2] and other == [0, 1] and group.pool.owners == [2, 1, 1, 0]
    assert group.missing(other, 6, 7) == 0
    assert group.extend(other, 6, 9) == (2, None)
    assert other == [0, 1, 3]


def test_a_page_without_a_token_before_the_next_is_not_shared():
    group = PageGroup(4, 0, 4)
    table: list[int] = []
    group.extend(table, 0, 5)
    assert group.share(table, 4) == [0]


def test_only_what_a_window_sees_is_shared():
    group = PageGroup(8, 4, 2)
    table: list[int] = []
    group.extend(table, 0, 9)
    assert group.share(table, 8) == [-1, -1, 2, 3]  # a query at 8 sees 5 to 8
    assert group.pool.owners[:5] == [1, 1, 2, 2, 1]


def test_release_gives_up_the_end_first():
    group = PageGroup(3, 0, 1)
    table: list[int] = []
    group.extend(table, 0, 3)
    for page, key in zip(table, KEYS, strict=False):
        group.pool.publish(page, key)
    group.release(table)
    assert table == []
    assert [group.pool.allocate() for _ in range(3)] == [2, 1, 0]


def published(blocks: list[int], window: int = 0, page_size: int = 2) -> PageGroup:
    """A group in which these blocks of KEYS are published."""
    group = PageGroup(8, window, page_size)
    for block in blocks:
        group.pool.publish(group.pool.allocate(), KEYS[block])
    return group


@pytest.mark.parametrize(
    ("groups", "blocks"),
    [
        ([published([])], 0),
        ([published([0, 1, 3])], 2),
        ([published([0, 1, 2]), published([0, 1])], 2),
        ([published([0, 1, 2]), published([1])], 0),
        ([published([2], window=3)], 3),  # a query at 6 sees 4 to 6
        ([published([2], window=4)], 0),  # and with 4, 3 to 6
        ([published([0, 1, 2, 3]), published([0, 2, 3], window=4)], 4),
        ([published([0, 1, 2]), published([0, 2, 3], window=4)], 1),
        ([published([0, 2, 3], window=4), published([1, 3, 4, 5], window=2)], 4),
        ([published([1], window=1), published([], window=1)], 8),  # a query sees only itself
    ],
)
def test_longest_prefix(groups, blocks):
    assert longest_prefix(groups, KEYS) == blocks


def test_a_table_begins_with_published_pages():
    group = published([0, 1, 2, 3], window=4)
    table: list[int] = []
    assert group.cached(KEYS[:4]) == [2, 3]
    group.share_cached(table, KEYS[:4])
    assert table == [-1, -1, 2, 3] and group.pool.owners[:4] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "num_pages must be at least 1, got 0"),
        ((1, -1, 1), "window must be at least 0 and page_size at least 1, got -1 and 1"),
        ((1, 0, 0), "window must be at least 0 and page_size at least 1, got 0 and 0"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        PageGroup(*arguments)
