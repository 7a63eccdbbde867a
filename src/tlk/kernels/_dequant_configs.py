"""Which kernel `dequant_mm` runs, and in which configuration: measured tables, then closed forms.

Tables are called "dequant_mm." and the kind, with dims (N, K, G); G is K for whole rows. Defaults are the
winners on an H100 (triton 3.6) for the four linears of a Llama-3.1-8B layer, cold weights, in CUDA graphs.
"""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from tlk.kernels._dequant import Quantized, halves, run_bytes
from tlk.kernels._dequant_linear import scales_of
from tlk.kernels._dequant_sm90_configs import gluon_candidates, gluon_config, takes
from tlk.kernels._dequant_wide import gluon_missing
from tlk.kernels._device import sm, sm_count
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels.tuning import Config, lookup

VERSION = 2  # of the kernels: raise it when measured configurations no longer apply

CUBLAS: Config = {"backend": "cublas"}
"""Dequantize, then matmul."""

FEW_ROWS = 16
"""Rows of x that "mma" and "sums" take by default."""

MANY_ROWS = 1024
"""Rows of x from which the weight is dequantized for cuBLAS."""


def choose(x: Tensor, w: Quantized, backend: str | None) -> Config:
    """The configuration of one call: forced, measured or the default."""
    if backend in ("cublas", "invariant"):
        return CUBLAS
    m, (n, k), arch = x.shape[:-1].numel(), w.shape, sm(x.device)
    if not _tensor_cores_fit(x, w, arch):
        return sums_config(m, w) if m <= FEW_ROWS or backend == "triton" else CUBLAS
    dims = n, k, k if w.whole_rows else w.group_size
    config = lookup(f"dequant_mm.{w.kind}", VERSION, x.device, x.dtype, dims, m)
    fit = config is not None and fits(config, w, dims, m)
    if config is not None and fit and (config["backend"] != "cublas" or backend is None):
        return config
    config = default_config(arch, sm_count(x.device), x.dtype, dims, max(m, 1), kind=w.kind)
    if config["backend"] == "cublas" and backend == "triton":
        return wide_config(arch, sm_count(x.device), m, n, k)
    return config


def _tensor_cores_fit(x: Tensor, w: Quantized, arch: int) -> bool:
    """Whether "mma" and "wide" can take the codes in runs of 16 bytes as they lie."""
    weight = w.weight
    aligned = weight.shape[1] % 16 == weight.stride(0) % 16 == weight.storage_offset() % 16 == 0
    return (
        arch >= 80
        and x.dtype != torch.float32
        and aligned
        and w.scale.storage_offset() % 2 == 0
        and scales_of(w, 4) is not None
    )


def fits(config: Config, w: Quantized, dims: tuple[int, ...], m: int) -> bool:
    """Whether a configuration, measured on a shape nearby, suits this weight and `m` rows too.

    "mma" is for few rows and wants scales that its lanes of words meet; a block of "wide" is not to be
    far lower than the rows, nor is "wide_sm90" to get what it does not take.
    """
    kernel, meta = config.get("kernel"), config.get("meta", {})
    if kernel == "mma":
        return m <= 2 * FEW_ROWS and scales_of(w, meta["WORDS"]) is not None
    if kernel == "wide_sm90":
        return gluon_missing() is None and takes(w.kind, dims)
    return kernel is None or (kernel == "wide" and 4 * meta["BLOCK_M"] >= min(m, 256))


def default_config(
    arch: int,
    processors: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    running: int,
    *,
    kind: str,
) -> Config:
    """What runs `running` rows of x and a weight of `dims` (N, K, G) where no table says anything."""
    n, k, _ = dims
    if running <= FEW_ROWS:
        return mma_config(processors, kind, running, dims)
    if running < MANY_ROWS and arch == 90 and takes(kind, dims) and gluon_missing() is None:
        return gluon_config(processors, kind, running, dims)
    return wide_config(arch, processors, running, n, k) if running < MANY_ROWS else CUBLAS


@lru_cache
def mma_config(processors: int, kind: str, m: int, dims: tuple[int, ...]) -> Config:
    """The default of "mma" for m rows of x; fits every SM from sm_80.

    Where W is tall, more programs of 4 warps; else 8 warps share rows of W, and each has half as far to go.
    """
    n, k, group = dims
    grouped_bytes = halves(kind) == 1 and group < k
    block_m = next_power_of_2(min(m, 16))
    tall = n >= 40 * processors
    words = 2 if kind == "table4" and group == 64 else 4
    warps, rows = 4 if tall else 8, 1
    if block_m == 16:
        rows, tiles = 2, 1 if halves(kind) == 2 else 2
    elif halves(kind) == 1:
        warps, tiles = 8, 4
    elif block_m == 8:
        rows, tiles = (2, 1) if tall else (1, 2)
    else:
        tiles = 4 if tall and block_m < 4 else 2
    if grouped_bytes:  # each tile loads scales
        warps, tiles = 4 if tall else 8, max(tiles // 2, 1)
    if words == 2:
        tiles *= 2
        waves = n > 32 * processors  # more than two programs an SM
        if block_m < 8:
            warps, tiles = (8, 4) if block_m < 4 and not waves else (4, 4 if waves else 8)
    return _mma(block_m, rows, warps, tiles, words, grouped_bytes)


def _mma(
    block_m: int, rows: int, warps: int, tiles: int, words: int, grouped_bytes: bool
) -> Config:
    meta = {"BLOCK_M": block_m, "ROWS": rows, "WARPS": warps, "TILES": tiles, "WORDS": words}
    # ptxas else aims for more programs an SM: it spills, or loads the next words after these are multiplied
    if words == 2 and warps == 8 and block_m < 4:
        meta["maxnreg"] = 128
    elif warps == 4 or words == 2 or grouped_bytes:
        meta["maxnreg"] = 255
    return {"backend": "triton", "kernel": "mma", "meta": meta}


@lru_cache
def wide_config(arch: int, processors: int, m: int, n: int, k: int) -> Config:
    """The default of "wide" for m rows of x and a weight [n, k]; fits every SM from sm_80."""
    block_m = min(max(next_power_of_2(max(m, 1)), 16), 128)
    tall = cdiv(n, 128) * cdiv(m, block_m) >= processors
    block_n, warps = (128, 8) if tall else (64, 4)
    splits, programs = 1, cdiv(n, block_n) * cdiv(m, block_m)
    while splits < 4 and 2 * splits * programs <= 2 * processors and k // splits >= 2048:
        splits *= 2
    # of few rows a stage is small, and on an H100 four took two thirds of the time of three
    stages = 4 if arch == 90 and block_m <= 64 and not tall else 3 if arch in (80, 90, 100) else 2
    return _wide(block_m, block_n, warps, splits, stages)


def _wide(block_m: int, block_n: int, warps: int, splits: int, stages: int) -> Config:
    meta = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP_N": 1, "SPLITS": splits}
    meta |= {"WARPS": warps, "STAGES": stages}
    return {"backend": "triton", "kernel": "wide", "meta": meta}


def sums_config(m: int, w: Quantized) -> Config:
    """The configuration without tensor cores; fits every SM."""
    block_m = min(next_power_of_2(max(m, 1)), 4)
    run = run_bytes(w)
    meta = {"BLOCK_M": block_m, "BLOCK_N": 4, "RUN": run, "RUNS": max(512 // run, 1)}
    return {"backend": "triton", "kernel": "sums", "meta": meta | {"num_warps": 4}}


def candidates(
    arch: int,
    processors: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    running: int,
    *,
    kind: str,
) -> list[Config]:
    """What may be fastest for `running` rows of x and a weight of `dims` (N, K, G)."""
    found: list[Config] = []
    k, group = dims[1:]
    if arch < 80 or dtype == torch.float32:
        return found
    top = next_power_of_2(running)
    if running <= 2 * FEW_ROWS:
        widths = (2, 4) if kind == "table4" and group == 64 else (4,)
        for words, rows, warps, tiles in product(widths, (1, 2), (4, 8), (1, 2, 4, 8)):
            fits = kind != "table4" or warps * rows * top <= 256  # sums of warps beside the table
            if fits and tiles * rows * words * max(top // 8, 1) <= 32:
                grouped_bytes = halves(kind) == 1 and group < k
                found.append(_mma(top, rows, warps, tiles, words, grouped_bytes))
    if running >= FEW_ROWS:
        heights = sorted({min(max(height, 16), 128) for height in (top, top // 2, min(top, 64))})
        for block_m, (block_n, warps), splits, stages in product(
            heights, ((64, 4), (128, 8)), (1, 2, 4), (3, 4)
        ):
            found.append(_wide(block_m, block_n, warps, splits, stages))
    if running > FEW_ROWS and arch == 90 and takes(kind, dims) and gluon_missing() is None:
        found += gluon_candidates(kind, running, dims)
    return [*found, CUBLAS]
