"""How the kernels of `_linear.py` are configured: closed forms that fit every SM, and what may be faster.

The forms are for where no table of measured configurations answers; the candidates are what `tlk tune`
fills such tables from.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch

from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels.tuning import Config

DECODE_ROWS = 16  # up to here a linear layer is a matter of reading W once
DOT_ROWS = 64  # up to here "dot" may still be faster than cuBLAS
LONGEST_ROW = 32768  # bytes of x that "gemv" keeps in the registers of a program

MOST_ROWS = {"gemv": 1, "fma": DECODE_ROWS, "dot": DOT_ROWS}
"""Rows of x beyond which a table's word for a kernel, measured on fewer, is not taken."""

CUBLAS: Config = {"backend": "cublas"}

# BLOCK_M, BLOCK_N, BLOCK_K, warps and stages that "tile" is tuned over
TILES = (
    (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 128, 64, 4, 4), (64, 128, 128, 4, 3),
    (128, 64, 64, 4, 4), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4),
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
)  # fmt: skip
TILES_OF_FLOATS = ((64, 64, 16, 8, 3), (64, 64, 16, 4, 4), (64, 128, 16, 8, 3), (128, 64, 16, 8, 3))


@lru_cache
def decode_config(arch: int, processors: int, dtype: torch.dtype, m: int, n: int, k: int) -> Config:
    """The Triton configuration for up to `DECODE_ROWS` rows and a weight [n, k]; fits every SM."""
    size = dtype.itemsize
    if m == 1 and k * size <= LONGEST_ROW:
        return {"backend": "triton", "kernel": "gemv", "meta": _gemv_meta(size, k)}
    if arch < 80 or dtype == torch.float32 or m == 1:
        block_m = min(next_power_of_2(max(m, 1)), 8)
        # 16-byte loads of 4 or 2 warps cover BLOCK_K, so that lanes meet only in the last reduction
        meta = {
            "BLOCK_M": block_m,
            "BLOCK_N": 4 if block_m < 4 else 2,
            "BLOCK_K": (2048 if block_m < 4 else 1024) // size,
        }
        return {"backend": "triton", "kernel": "fma", "meta": {**meta, "num_warps": 4}}
    # The tallest tile of W that half the SMs get; a warp multiplies 16 of its rows. As many stages as
    # the SM has memory for: 6 of 64 rows took 42.7 µs for 4096 × 14336 where 4 took 45 (H100, M = 16).
    block_n = next((b for b in (64, 32) if cdiv(n, b) >= 0.45 * processors), 16)
    block_m = 8 if m <= 8 else 16
    memory = (128 if arch in (80, 90, 100) else 96) * 1024
    meta = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 128, "PREFETCH": 256}
    meta |= {"num_warps": block_n // 16, "num_stages": memory // ((block_n + 16) * 128 * 2)}
    return {"backend": "triton", "kernel": "dot", "meta": meta}


def _gemv_meta(size: int, k: int) -> dict[str, int]:
    """32 values of a row a thread, 16 KB or more of W a tile, and 8 warps an SM or more.

    On an H100 28672 × 4096 took 75.0 µs in programs of 4 tiles, 77.7 in one wave of 28 tiles each; only
    rows of 14336 were faster in one wave, 38.8 µs and not 40.4.
    """
    width = next_power_of_2(k)
    warps = min(max(width // 1024, 1), 16)
    rows = (8 if warps < 16 else 4) // size * max(1024 // width, 1)
    most = 4 if warps < 16 else 16
    return {"BLOCK_N": rows, "PER_SM": max(8 // warps, 1), "MOST_TILES": most, "num_warps": warps}


@lru_cache
def tile_config(arch: int, dtype: torch.dtype) -> Config:
    """The Triton configuration for many rows; fits every SM."""
    if arch < 80:
        block, warps, stages = (64, 32, 32), 4, 2
    elif dtype == torch.float32:
        block, warps, stages = (64, 64, 16), 8, 3
    elif arch in (90, 100):
        block, warps, stages = (128, 128, 64), 8, 3
    else:
        block, warps, stages = (128, 128, 32), 8, 4
    meta = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    meta |= {"GROUP_M": 8, "num_warps": warps, "num_stages": stages}
    return {"backend": "triton", "kernel": "tile", "meta": meta}


def default_config(
    arch: int, processors: int, dtype: torch.dtype, dims: tuple[int, ...], running: int
) -> Config:
    """What runs `running` rows of x and a weight [n, k] = `dims` where no table says anything."""
    if running <= (4 if dtype == torch.float32 else DECODE_ROWS):
        return decode_config(arch, processors, dtype, running, *dims)
    if arch == 90 and dtype.itemsize == 2 and running <= DOT_ROWS:
        return _dot_of_many_rows(processors, running, dims[0])
    return CUBLAS


@lru_cache
def _dot_of_many_rows(processors: int, running: int, n: int) -> Config:
    """For 17 to 64 rows, as measured on an H100 (µs, "dot" and cuBLAS).

    32 rows: 4096 × 14336 43.4 and 46.5, 6144 × 4096 19.5 and 21.6, 28672 × 4096 81.8 and 84.5. 64 rows:
    28672 × 4096 84.0 and 87.7, 6144 × 4096 20.2 and 20.7; 4096 rows of W are then too few for the SMs.
    """
    if cdiv(n, 64) < (0.45 if running <= 32 else 0.7) * processors:
        return CUBLAS  # which divides K among the SMs
    wide = cdiv(n, 128) >= processors
    if running <= 32:
        blocks = (32, 128, 128, 4, 3) if wide else (32, 64, 128, 4, 8)
    else:
        blocks = (64, 128, 128, 8, 4) if wide else (64, 64, 64, 4, 8)
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
    return triton_config("dot", **dict(zip(names, blocks, strict=True)), PREFETCH=256)


def candidates(
    arch: int, processors: int, dtype: torch.dtype, dims: tuple[int, ...], running: int
) -> list[Config]:
    """What may be fastest for `running` rows of x and a weight [n, k] = `dims`."""
    found = decode_candidates(arch, processors, dtype, dims, running)
    if running > DECODE_ROWS and arch >= 80:
        found += [triton_config("tile", **meta) for meta in _tile_metas(dtype, running)]
    return [*found, CUBLAS]


def decode_candidates(
    arch: int, processors: int, dtype: torch.dtype, dims: tuple[int, ...], running: int
) -> list[Config]:
    """The configurations of "gemv", "fma" and "dot" worth a measurement; none for many rows."""
    (n, k), size = dims, dtype.itemsize
    tensor_cores = arch >= 80 and size == 2
    found: list[Config] = []
    if running == 1 and k * size <= LONGEST_ROW:
        found = [triton_config("gemv", **meta) for meta in _gemv_metas(size, processors, n, k)]
    elif running <= (4 if tensor_cores else DECODE_ROWS):
        found = [triton_config("fma", **meta) for meta in _fma_metas(size, running)]
    if tensor_cores and 1 < running <= DOT_ROWS:
        metas = _dot_metas(arch, processors, n, running)
        found += [triton_config("dot", **meta) for meta in metas]
    return found


def fits(config: Config, processors: int, dtype: torch.dtype, n: int, k: int, running: int) -> bool:
    """Whether a configuration, measured on a shape nearby, suits a weight [n, k] and `running` rows too.

    It is not to be taken for more rows than its kernel is for, nor where a thread of "gemv" would
    hold another number of bytes of W than it was tuned with, or tiles of "dot" be too few for the SMs.
    """
    kernel = config.get("kernel", "")
    if running > MOST_ROWS.get(kernel, running):
        return False
    if kernel == "gemv":
        row, meta = next_power_of_2(k) * dtype.itemsize, config["meta"]
        a_thread = meta["BLOCK_N"] * row // (32 * meta["num_warps"])
        return k * dtype.itemsize <= LONGEST_ROW and 128 <= a_thread <= 256
    if kernel == "dot":
        block_n = config["meta"]["BLOCK_N"]
        return block_n == 16 or cdiv(n, block_n) >= 0.4 * processors
    return True


def triton_config(kernel: str, **meta: int) -> Config:
    return {"backend": "triton", "kernel": kernel, "meta": meta}


def _gemv_metas(size: int, processors: int, n: int, k: int) -> Iterator[dict[str, int]]:
    """128 or 256 bytes of W a thread; programs of a few tiles each, or one, two or four an SM."""
    width = next_power_of_2(k) * size
    for warps, rows in itertools.product((2, 4, 8, 16), (1, 2, 4, 8, 16)):
        if not 128 <= rows * width // (32 * warps) <= 256:
            continue
        met = set()
        for per_sm, most in ((1, 1), (1, 2), (1, 4), (1, 8), (4, n), (2, n), (1, n)):
            steps = min(cdiv(cdiv(n, rows), per_sm * processors), most)
            if steps not in met:
                met.add(steps)
                yield {"BLOCK_N": rows, "PER_SM": per_sm, "MOST_TILES": most, "num_warps": warps}


def _fma_metas(size: int, running: int) -> Iterator[dict[str, int]]:
    """8 to 64 sums a thread."""
    block_m = min(next_power_of_2(running), 8)
    for block_n, nbytes, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (4, 8)):
        if 8 <= block_m * block_n * (nbytes // size) // (32 * warps) <= 64:
            blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": nbytes // size}
            yield blocks | {"num_warps": warps}


def _dot_metas(arch: int, processors: int, n: int, running: int) -> Iterator[dict[str, int]]:
    """Tiles of W that half the SMs get or more, and pipelines as deep as shared memory allows."""
    rows = next_power_of_2(running)
    heights = (8, 16) if rows <= 8 else (rows,) if rows == 16 else (rows // 2, rows)
    memory = (64, 96) if arch in (86, 89, 120) else (64, 96, 128, 192)
    for block_m, block_n, block_k in itertools.product(heights, (16, 32, 64, 128), (64, 128, 256)):
        tiles = cdiv(n, block_n)
        if tiles < 0.4 * processors or (block_n < 64 and tiles > 8 * processors):
            continue
        stage = (block_n + block_m) * block_k * 2
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
        for stages in sorted({min(m * 1024 // stage, 8) for m in memory} - {0, 1}):
            for warps in sorted({block_n // 16, min(block_n // 16, 4)}):
                yield blocks | {"PREFETCH": 256, "num_warps": warps, "num_stages": stages}


def _tile_metas(dtype: torch.dtype, running: int) -> Iterator[dict[str, int]]:
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
    for values in TILES_OF_FLOATS if dtype == torch.float32 else TILES:
        if values[0] <= max(next_power_of_2(running), 64):
            yield dict(zip(names, values, strict=True)) | {"GROUP_M": 8}
