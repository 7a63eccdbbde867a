"""Pages of the KV cache: who owns them, and which hold what a later prompt may need again.

A pool counts the owners of each of its pages. A page whose tokens are known is published under a key
that stands for all tokens up to its end; it stays findable after its last owner has gone, until the
pool needs the page for something else (the one that lay idle longest goes first). Every operation on
a page is O(1).
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

Key = bytes
KEY_BYTES = 16  # 128 bits: two prefixes of one key would give a wrong answer, silently


def root_key(*salts: bytes) -> Key:
    """Where the chain of a prefix's keys starts: from all that its keys and values depend on."""
    state = blake2b(digest_size=KEY_BYTES)
    for salt in salts:
        state.update(len(salt).to_bytes(8, "little") + salt)
    return state.digest()


def block_key(previous: Key, tokens: Sequence[int]) -> Key:
    """The key of a full block of token ids (each below 2³¹) behind the prefix of key `previous`."""
    return blake2b(previous + array("i", tokens).tobytes(), digest_size=KEY_BYTES).digest()


class PagePool:
    """Page ids 0 ≤ page < num_pages with their owners and keys.

    A page is free, idle (published, but nobody's) or owned by `owners[page]` tables. `published` has
    the page of every key that can be shared.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self.owners = [0] * num_pages
        self.published: dict[Key, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, Key] = OrderedDict()  # the next to be evicted first
        self._keys: list[Key | None] = [None] * num_pages

    @property
    def available(self) -> int:
        """Pages that `allocate` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages without an owner that are kept for a later prompt."""
        return len(self._idle)

    def allocate(self) -> int:
        """A page with one owner: a free one, else the one that lay idle longest. IndexError if none."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, key = self._idle.popitem(last=False)
            del self.published[key]
            self._keys[page] = None
        else:
            raise IndexError(f"all {self.num_pages} pages are owned")
        self.owners[page] = 1
        return page

    def retain(self, page: int) -> int:
        """Add an owner to an owned or idle page; gives the page."""
        if self.owners[page] == 0:
            del self._idle[page]  # KeyError: a free page holds nothing to share
        self.owners[page] += 1
        return page

    def release(self, page: int) -> None:
        """Take an owner away; ValueError if there is none. Without any, a published page lies idle."""
        if self.owners[page] == 0:
            raise ValueError(f"page {page} has no owner to release it")
        self.owners[page] -= 1
        if self.owners[page] == 0:
            key = self._keys[page]
            if key is None:
                self._free.append(page)
            else:
                self._idle[page] = key

    def publish(self, page: int, key: Key) -> None:
        """Have an owned page stand for `key`, unless another does already."""
        if self.owners[page] == 0:
            raise ValueError(f"page {page} has no owner, so it cannot be published")
        if self._keys[page] is None and key not in self.published:
            self.published[key] = page
            self._keys[page] = key


class PageGroup:
    """The pool of the layers that cache alike, and the rules of their page tables.

    A table is a list: entry i is the page of tokens i · page_size onwards, -1 where no later query
    looks. window W > 0: a query sees the W latest positions, its own included; 0: all.
    """

    def __init__(self, num_pages: int, window: int, page_size: int) -> None:
        if window < 0 or page_size < 1:
            raise ValueError(
                f"window must be at least 0 and page_size at least 1, got {window} and {page_size}"
            )
        self.pool = PagePool(num_pages)
        self.window, self.page_size = window, page_size

    @property
    def longest_chunk(self) -> int:
        """Tokens that a sequence of any length can compute at once; below 1: none, with a window."""
        if not self.window:
            return self.pool.num_pages * self.page_size
        return (self.pool.num_pages - 1) * self.page_size - self.window + 2

    def pages_for(self, tokens: int, chunk: int) -> int:
        """The most pages held at once by a sequence of so many tokens, computed `chunk` at a time."""
        pages = -(-tokens // self.page_size)
        if (
            self.window
        ):  # what the first query of a chunk sees, and the chunk, wherever a page starts
            pages = min(pages, (self.window + chunk + self.page_size - 3) // self.page_size + 1)
        return pages

    def first_seen(self, position: int) -> int:
        """The first table entry that a query at `position` looks at."""
        return max(0, position - self.window + 1) // self.page_size if self.window else 0

    def shares_next(self, table: list[int], start: int) -> bool:
        """Whether position `start`, the next to be written, lies in a page with other owners too."""
        index = start // self.page_size
        return index < len(table) and self.pool.owners[table[index]] > 1

    def missing(self, table: list[int], start: int, stop: int) -> int:
        """Pages to allocate before start ≤ position < stop can be written."""
        return -(-stop // self.page_size) - len(table) + self.shares_next(table, start)

    def extend(self, table: list[int], start: int, stop: int) -> tuple[int, int | None]:
        """Give positions start to stop pages of the table's own (`missing` ones must be available).

        Returns the first entry that changed, and the page whose tokens before `start` have to be
        copied into that entry's, or None.
        """
        first, source = len(table), None
        if self.shares_next(table, start):
            first = start // self.page_size
            source = table[first]
            table[first] = self.pool.allocate()
            self.pool.release(source)
        for _ in range(-(-stop // self.page_size) - len(table)):
            table.append(self.pool.allocate())
        return first, source

    def share(self, table: list[int], position: int) -> list[int]:
        """A second table, on the pages of `table` that a query at `position` sees before itself."""
        first = self.first_seen(position)
        pages = table[first : -(-position // self.page_size)]
        return [-1] * first + [self.pool.retain(page) for page in pages]

    def cached(self, keys: Sequence[Key]) -> list[int]:
        """The published pages that a query behind the blocks of these keys sees."""
        first = self.first_seen(len(keys) * self.page_size)
        return [self.pool.published[key] for key in keys[first:]]

    def share_cached(self, table: list[int], keys: Sequence[Key]) -> None:
        """Begin an empty table with published pages."""
        pages = self.cached(keys)
        table += [-1] * (len(keys) - len(pages)) + [self.pool.retain(page) for page in pages]

    def drop_unseen(self, table: list[int], position: int) -> None:
        """Release the pages that no query at `position` or later sees."""
        for index in range(min(self.first_seen(position), len(table)) - 1, -1, -1):
            if table[index] < 0:
                break  # and so are all before it
            self.pool.release(table[index])
            table[index] = -1

    def release(self, table: list[int]) -> None:
        """Empty the table. Its end is given up first: a prefix serves more prompts than what follows."""
        while table:
            if (page := table.pop()) >= 0:
                self.pool.release(page)


def longest_prefix(groups: Sequence[PageGroup], keys: Iterable[Key]) -> int:
    """The most blocks of a chain of keys after which every group has all pages a query looks at."""
    longest, runs = 0, [0] * len(groups)
    for blocks, key in enumerate(keys, 1):
        enough = True
        for g, group in enumerate(groups):
            runs[g] = runs[g] + 1 if key in group.pool.published else 0
            if runs[g] < blocks - group.first_seen(blocks * group.page_size):
                if not group.window:
                    return longest
                enough = False
        if enough:
            longest = blocks
    return longest
