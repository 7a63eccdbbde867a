"""Inline assembly of the kernels in NumPy, on registers of 32 bits: what integer instructions do, and shared memory."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    picks = ((selector >> (4 * i) & 7).astype(np.uint64) for i in range(4))
    parts = ((both >> (8 * pick) & 0xFF) << np.uint64(8 * i) for i, pick in enumerate(picks))
    return sum(parts).astype(np.uint32)


def dot_of_bytes(a: Array, b: Array, c: Array) -> Array:
    """Σ aᵢ · bᵢ + c over four unsigned bytes."""
    return c + sum((a >> 8 * i & 0xFF) * (b >> 8 * i & 0xFF) for i in range(4))


class SharedMemory:
    """An array that a program declares: what it has not written yet is garbage."""

    start = 1024

    def declare(self) -> Array:
        self.words = np.full(8448, 0xDEADBEEF, np.uint32)
        return np.array([self.start], np.uint32)

    def place(self, address: Array) -> Array:
        place, rest = np.divmod(address.astype(np.int64) - self.start, 4)
        if rest.any() or (place < 0).any() or (place >= self.words.size).any():
            raise IndexError("shared memory is accessed out of bounds, or not at words")
        return place

    def store_four(self, address: Array, value: Array) -> Array:
        place, value = np.broadcast_arrays(self.place(address), value)
        if (place % 4).any():
            raise IndexError("shared memory is written at addresses that are no multiples of 16")
        for i in range(4):
            self.words[place + i] = value
        return np.zeros(place.shape, np.uint32)

    def store(self, address: Array, value: Array) -> Array:
        self.words[self.place(address)] = value
        return np.zeros(address.shape, np.uint32)

    def load(self, address: Array) -> Array:
        return self.words[self.place(address)]


SHARED = SharedMemory()
LANES = cycle(np.arange(32, dtype=np.uint32))  # a program is one thread, each time another one

# By what it starts with.
INSTRUCTIONS: dict[str, Callable[..., Array]] = {
    "lop3.b32 $0, $1, $2, $3, 0xEA;": lambda a, b, c: (a & b) | c,
    "prmt.b32 ": permute_bytes,
    "dp4a.u32.u32 ": dot_of_bytes,
    "{ .shared .align 128 .b8 tables[33792]; mov.u32 $0, tables; }": SHARED.declare,
    "st.shared.v4.b32 [$1], {$2, $2, $2, $2};": SHARED.store_four,
    "st.shared.b32 [$1], $2;": SHARED.store,
    "ld.shared.b32 ": SHARED.load,
    "mov.b32 $0, $1;": np.copy,
    "mov.u32 $0, %laneid;": lambda: np.array([next(LANES)]),
}
