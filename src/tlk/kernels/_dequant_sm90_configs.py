"""Which tiles "wide_sm90" of `dequant_mm` gets, by what they were measured to take.

Times are of an H100 with triton 3.6 and int4 in groups of 128; no other kind has tiles of its own.
"""

from collections.abc import Iterator
from functools import lru_cache

from tlk.kernels._dequant import halves
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels.tuning import Config

STEP_US = {
    (64, 1): 0.30, (64, 2): 0.45, (128, 2): 0.62, (128, 3): 0.92, (256, 2): 1.18,
}  # fmt: skip
"""Microseconds of 128 columns of W for tiles of BLOCK_M rows of x and 64 · CONSUMERS of W."""

PROGRAM_US = 3.5
"""From the start of a program to its first step, and from its last to its end."""


def takes(kind: str, dims: tuple[int, ...]) -> bool:
    """Whether rows of W [N, K] come in pairs of 8, and boxes of x end with what they multiply."""
    n, k, group = dims
    return n % 16 == 0 and (halves(kind) == 1 or group < k or k % 512 == 0)


@lru_cache
def gluon_config(processors: int, kind: str, m: int, dims: tuple[int, ...]) -> Config:
    """The default of "wide_sm90" for m rows of x: of all tiles those that are done first."""
    tiles = (
        (_us(meta, processors, m, dims), i, meta) for i, meta in enumerate(_metas(kind, m, dims))
    )
    return _config(min(tiles)[2])


def gluon_candidates(kind: str, m: int, dims: tuple[int, ...]) -> list[Config]:
    """What may be fastest for m rows of x."""
    return [_config(meta) for meta in _metas(kind, m, dims)]


def _config(meta: dict[str, int]) -> Config:
    return {"backend": "triton", "kernel": "wide_sm90", "meta": meta}


def _metas(kind: str, m: int, dims: tuple[int, ...]) -> Iterator[dict[str, int]]:
    """Tiles no higher than m rows need, and ways to split K.

    Three consumers a program leave too few registers for 8-bit codes, and for the scales of small groups.
    """
    most = min(max(next_power_of_2(m), 64), 256)
    few_registers = halves(kind) == 1 or dims[2] < 128
    for block_m, consumers in STEP_US:
        for splits in (1, 2, 3, 4, 6, 8):
            if most // 2 <= block_m <= most and not (consumers == 3 and few_registers):
                yield _meta(kind, block_m, consumers, splits)


def _meta(kind: str, block_m: int, consumers: int, splits: int) -> dict[str, int]:
    """As many stages as leave room for two programs an SM where tiles are small; at most 5."""
    stage = block_m * 256 + consumers * (8192 if halves(kind) == 1 else 4096)
    stages = min((110 if block_m == 64 else 224) * 1024 // stage, 5)
    meta = {"BLOCK_M": block_m, "CONSUMERS": consumers, "SPLITS": splits}
    return meta | {"STAGES": stages, "UNROLL": 2}


def _us(meta: dict[str, int], processors: int, m: int, dims: tuple[int, ...]) -> float:
    """Estimated microseconds."""
    n, k, _ = dims
    tile, splits = (meta["BLOCK_M"], meta["CONSUMERS"]), meta["SPLITS"]
    programs = cdiv(n, 64 * tile[1]) * cdiv(m, tile[0]) * splits
    steps = 2 * cdiv(cdiv(k, 128), 2 * splits)
    us = cdiv(programs, processors) * (PROGRAM_US + steps * STEP_US[tile])
    return us + (3.0 + splits * m * n * 8 / 2.5e6 if splits > 1 else 0.0)
