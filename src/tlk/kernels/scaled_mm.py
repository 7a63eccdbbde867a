"""Linear layer whose weight and activations are 8 bits wide, with a fused epilogue.

    y = act(Σ_k x w · s_x s_w + b) + residual              x [M, K], W [N, K], float8_e4m3fn or int8

Scales are float32, one for each row of x and of W, or for float8 one for each 1 × 128 block of x and
128 × 128 block of W (DeepSeek-AI, "DeepSeek-V3 Technical Report", https://arxiv.org/abs/2412.19437). The
epilogue runs in float32 and y is rounded once. What runs depends on the shape; tables of measured
configurations (tuning.py) come before these defaults:

- up to `FEW_ROWS` rows ("ring" on sm_90, "dot"): tensor cores, with W as the left operand. Per layer of
  Llama-3.1-8B on an H100: float8 80 µs for 1 row and 82 for 16, where torch._scaled_mm takes 134 and 129.
- more in int8 ("tma" on sm_90 and newer): tiles, as large as leaves every SM more than one. 8192³ takes
  839 µs on an H100, torch._int_mm alone 1230.
- more in float8: "cublas", torch._scaled_mm. It adds with care unless told otherwise, as the kernels here
  do: sums left to the tensor cores of sm_90 came out 7 % off for 4096 positive products. Scales of
  blocks up to `BLOCK_ROWS` rows, and what cuBLAS refuses: "tma" or "tile".
- "cublas" in int8 is torch._int_mm and one kernel for scales and epilogue; in float8 an epilogue runs on
  sums that are rounded to `out_dtype`.
- int8 below sm_80, where Triton has no tensor cores: "sums" for up to 16 rows, cuBLAS for more.

Cost: N·K bytes for small M (W is read once), 2·M·N·K operations for large M.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tlk.errors import UnsupportedError
from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._device import sm, sm_count
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._linear import _activated
from tlk.kernels._op import op
from tlk.kernels._scaled import IN_BOXES, in_boxes, launch, ring_missing
from tlk.kernels.act_quant import GROUP, LARGEST, require_fp8
from tlk.kernels.matmul import ACTIVATIONS, activate_reference
from tlk.kernels.tuning import Config, lookup

BACKENDS = (None, "triton", "cublas")

VERSION = 1  # of the kernels: raise it when measured configurations no longer apply

FEW_ROWS = 64  # up to here W is the left operand
BLOCK_ROWS = 512  # up to here "tma" multiplies scaled blocks: 256 rows 12.7 µs, cuBLAS 15.5; 1024 39 and 30 (H100)
SUM_ROWS = 16  # up to here "sums" serves int8 without tensor cores

TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
TILES = (
    (64, 64, 128, 4, 4), (64, 64, 128, 4, 6), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4),
    (128, 128, 128, 4, 3), (128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (256, 128, 128, 8, 3),
)  # fmt: skip
"""What tiles of many rows are tuned over."""

CUBLAS: Config = {"backend": "cublas"}


def scaled_mm_reference(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.int8 else torch.float32  # integer sums are exact
    a, b = x.to(wide), weight.to(wide)
    blockwise = is_blockwise(weight, weight_scale)
    if blockwise:
        k = x.shape[-1]
        a = a * x_scale.repeat_interleave(GROUP, -1)[..., :k]
        rows = weight_scale.repeat_interleave(GROUP, 0)[: weight.shape[0]]
        b = b * rows.repeat_interleave(GROUP, 1)[:, :k]
    y = F.linear(a, b).float()
    if not blockwise:
        y = y * x_scale * weight_scale.T
    y = activate_reference(y if bias is None else y + bias.float(), activation)
    return (y if residual is None else y + residual.float()).to(out_dtype)


@triton.jit
def _scale_kernel(
    sums_ptr, xs_ptr, ws_ptr, bias_ptr, residual_ptr, y_ptr,
    N, stride_xs, stride_ws, stride_residual, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(sums · s_x s_w + b) + residual, one program per BLOCK columns of a row; no xs: no scales."""
    blocks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(sums_ptr + row * N + n, n < N, other=0).to(tl.float32)
    if xs_ptr is not None:
        sx = tl.load(xs_ptr + row * stride_xs)
        y = y * sx * tl.load(ws_ptr + n * stride_ws, n < N, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    y = _activated(y, ACTIVATION)
    if residual_ptr is not None:
        at = residual_ptr + row * stride_residual + n
        y += tl.load(at, n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), n < N)


def kind_of(weight: Tensor, weight_scale: Tensor) -> str:
    """The op that tables know a call as."""
    if weight.dtype == torch.int8:
        return "scaled_mm.int8"
    return "scaled_mm.fp8_block" if is_blockwise(weight, weight_scale) else "scaled_mm.fp8"


def is_blockwise(weight: Tensor, weight_scale: Tensor) -> bool:
    """Whether scales are of blocks, and not of rows."""
    return weight_scale.shape != (weight.shape[0], 1)


def default_config(
    arch: int,
    processors: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    running: int,
    blockwise: bool = False,
) -> Config:
    """What runs `running` rows of x and a weight [n, k] = `dims` where no table says anything."""
    most = SUM_ROWS if arch < 80 else BLOCK_ROWS if blockwise else FEW_ROWS
    if running > most and (dtype != torch.int8 or arch not in (90, 100)):
        return CUBLAS
    return triton_config(arch, processors, dtype, dims, running, blockwise, dims[1] % 16 == 0)


@lru_cache
def triton_config(
    arch: int,
    processors: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    running: int,
    blockwise: bool,
    boxes: bool,
) -> Config:
    """The Triton configuration; fits every SM. `boxes`: the TMA unit can read x and the weight."""
    if arch < 80:
        return _config("sums", **_sums_meta(running))
    if running > FEW_ROWS:
        return tile_config(arch, processors, running, dims[0], blockwise, boxes)
    if arch == 90 and boxes and ring_missing() is None:
        return _config("ring", **_ring_meta(running, blockwise))
    return _config("dot", **_dot_meta(arch, running, blockwise))


def _config(kernel: str, **meta: int) -> Config:
    return {"backend": "triton", "kernel": kernel, "meta": meta}


def _sums_meta(m: int) -> dict[str, int]:
    block_m = min(next_power_of_2(max(m, 1)), 8)
    blocks = (block_m, 4, 2048) if block_m < 4 else (block_m, 2, 1024)
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True)) | {"num_warps": 4}


def _ring_meta(m: int, blockwise: bool) -> dict[str, int]:
    """Wide steps, since each waits for the tensor cores; a block's scale lasts for 128 columns."""
    block_m = min(max(next_power_of_2(max(m, 1)), 8), 64)
    if blockwise:
        block_k, stages = 128, {8: 10, 16: 8}.get(block_m, 6)
    else:
        block_k, stages = (512, 4) if block_m <= 16 else (256, 6)
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "STAGES": stages}


def _dot_meta(arch: int, m: int, blockwise: bool) -> dict[str, int]:
    block_m = min(max(next_power_of_2(max(m, 1)), 16), 32 if blockwise else 64)
    memory = (144 if arch in (80, 90, 100) else 80) * 1024
    meta = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 128, "PREFETCH": 256, "PROMOTE": 128}
    return meta | {"num_warps": 4, "num_stages": min(memory // ((64 + block_m) * 128), 14)}


def tile_config(arch: int, processors: int, m: int, n: int, blockwise: bool, boxes: bool) -> Config:
    """The Triton configuration for many rows; fits every SM."""
    if arch in (90, 100) and boxes:
        meta = _tma_meta(processors, m, n, blockwise)
        return _config("tma", **meta | ({"num_warps": 8} if arch == 100 else {}))  # 4 spill there
    if arch in (80, 90, 100):
        values = (128, 128, 128, 8, 3)
    else:
        values = (128, 64, 128, 8, 3) if blockwise else (128, 128, 64, 8, 3)
    return _config("tile", **dict(zip(TILE, values, strict=True)), GROUP_M=8, PROMOTE=values[2])


def _tma_meta(processors: int, m: int, n: int, blockwise: bool) -> dict[str, int]:
    """The largest tiles of which there are more than SMs, in two programs of 4 warps each: one stores
    and fills its pipeline while the other multiplies. Sums of blocks need registers: no large tiles.
    """
    tiles = ((128, 128, 3), (64, 128, 4), (64, 64, 6))[blockwise : 2 if blockwise else 3]
    block_m, block_n, stages = next(
        (t for t in tiles if 5 * cdiv(m, t[0]) * cdiv(n, t[1]) >= 7 * processors), tiles[-1]
    )
    values = (block_m, block_n, 128, 4, stages)
    meta = {"GROUP_M": 8, "PROMOTE": 128, "PARTS": 1, "FLATTEN": blockwise, "PER_SM": 2}
    return dict(zip(TILE, values, strict=True)) | meta


def candidates(
    arch: int,
    processors: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    running: int,
    blockwise: bool = False,
) -> list[Config]:
    """What may be fastest for `running` rows of x and a weight [n, k] = `dims`."""
    boxes = dims[1] % 16 == 0
    found: list[Config] = []
    if arch < 80:
        found += [_config("sums", **_sums_meta(running))] if running <= SUM_ROWS else []
    elif running <= FEW_ROWS:
        found += [_config("dot", **meta) for meta in _dot_metas(arch, running, blockwise)]
        if arch == 90 and boxes and ring_missing() is None:
            found += [_config("ring", **meta) for meta in _ring_metas(running, blockwise)]
    if arch >= 80 and running > FEW_ROWS // 2:
        kernel = "tma" if arch in (90, 100) and boxes else "tile"
        found += [_config(kernel, **meta) for meta in _tile_metas(kernel, running, blockwise)]
    return found if dtype == torch.int8 and running <= 16 else [*found, CUBLAS]


def _dot_metas(arch: int, m: int, blockwise: bool) -> Iterator[dict[str, int]]:
    rows = min(max(next_power_of_2(m), 16), 64)
    memory = (80, 144, 200) if arch in (80, 90, 100) else (48, 80)
    for block_n, block_k in itertools.product((32, 64, 128), (128,) if blockwise else (128, 256)):
        stage = (block_n + rows) * block_k
        meta = {"BLOCK_M": rows, "BLOCK_N": block_n, "BLOCK_K": block_k, "PREFETCH": 256}
        for stages in sorted({min(kib * 1024 // stage, 14) for kib in memory} - {0, 1}):
            yield meta | {"PROMOTE": 128, "num_warps": block_n // 16, "num_stages": stages}


def _ring_metas(m: int, blockwise: bool) -> Iterator[dict[str, int]]:
    rows = min(max(next_power_of_2(m), 8), 64)
    for kib, block_k in itertools.product((64, 100, 150, 210), (128, 256, 512)):
        stages = kib * 1024 // ((64 + rows) * block_k)
        if 2 <= stages <= 18 and not (blockwise and block_k > GROUP):
            yield {"BLOCK_M": rows, "BLOCK_K": block_k, "STAGES": stages}


def _tile_metas(kernel: str, m: int, blockwise: bool) -> Iterator[dict[str, int]]:
    promote = {"GROUP_M": 8, "PROMOTE": 128}
    for values in TILES:
        if values[0] > max(next_power_of_2(m), 64) or (blockwise and values[0] * values[1] > 16384):
            continue
        meta = dict(zip(TILE, values, strict=True)) | promote
        if kernel == "tile":
            yield meta
            continue
        for flatten in (False, True):
            parts = 2 if values[0] * values[1] > 16384 else 1
            per_sm = 1 if values[3] == 8 else 2
            yield meta | {"PARTS": parts, "FLATTEN": flatten, "PER_SM": per_sm}


def cublas_refuses(
    x: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: torch.dtype
) -> str | None:
    """Why torch has no matmul for such a call, or None."""
    m, (n, k) = x.shape[:-1].numel(), weight.shape
    if weight.dtype == torch.int8:
        if m <= 16 or n % 8 or k % 8:
            return (
                f"torch._int_mm wants more than 16 rows and N and K divisible by 8, got {(m, n, k)}"
            )
        return None
    if n % 16 or k % 16:
        return f"torch._scaled_mm wants N and K divisible by 16, got {(n, k)}"
    if is_blockwise(weight, weight_scale):
        if not _is_new(x.device) or out_dtype != torch.bfloat16:
            return "torch._scaled_mm takes scales of blocks on sm_90 with CUDA 12.9, and writes bfloat16"
        if m % 4 or n % GROUP or k % (4 * GROUP):  # with K = 192 it was wrong, and did not say so
            return f"scales of blocks are known to work for M / 4, N / 128 and K / 512, got {(m, n, k)}"
    elif out_dtype != torch.bfloat16 and not _is_new(x.device):
        return f"torch._scaled_mm with scales of rows writes bfloat16, not {out_dtype}"
    return None


@lru_cache
def _is_new(device: torch.device) -> bool:
    """Whether torch hands scales of rows and blocks to cuBLAS: on sm_90 since CUDA 12.9."""
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return device.type == "cuda" and sm(device) == 90 and version >= (12, 9)


def choose(
    x: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: torch.dtype, backend: str | None
) -> Config:
    """The configuration of one call: forced, measured or the default."""
    refusal = cublas_refuses(x, weight, weight_scale, out_dtype)
    if backend == "cublas":
        if refusal is not None:
            raise UnsupportedError(f'{refusal}: use backend="triton"')
        return CUBLAS
    arch, m, (n, k) = sm(x.device), x.shape[:-1].numel(), weight.shape
    processors, blockwise = sm_count(x.device), is_blockwise(weight, weight_scale)
    boxes = arch >= 90 and in_boxes(x.reshape(m, k)) and in_boxes(weight)
    if backend is None:
        kind = kind_of(weight, weight_scale)
        config = lookup(kind, VERSION, x.device, x.dtype, (n, k), m)
        if config is None:
            config = default_config(arch, processors, x.dtype, (n, k), m, blockwise)
        if _runs(config, boxes, refusal):
            return config
    return triton_config(arch, processors, x.dtype, (n, k), m, blockwise, boxes)


def _runs(config: Config, boxes: bool, refusal: str | None) -> bool:
    """Whether what was chosen by shape serves this call, too."""
    if config["backend"] == "cublas":
        return refusal is None
    return boxes or config["kernel"] not in IN_BOXES


def _cublas(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, activation: str | None, residual: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n, k = weight.shape
    m = x.shape[:-1].numel()
    rows, scales = x.reshape(m, k), x_scale.reshape(m, x_scale.shape[-1])
    is_int = x.dtype == torch.int8
    if is_int:
        sums = torch._int_mm(rows, weight.T)
    else:
        if is_blockwise(weight, weight_scale):  # one column of scales after the other
            by_row, by_column = scales.T.contiguous().T, weight_scale.contiguous().T
        else:
            by_row, by_column = scales.contiguous(), weight_scale.T.contiguous()
        sums = torch._scaled_mm(rows, weight.T, by_row, by_column, out_dtype=out_dtype)
        if bias is None and activation is None and residual is None:
            return sums.view(*x.shape[:-1], n)
    y = torch.empty((*x.shape[:-1], n), dtype=out_dtype, device=x.device) if is_int else sums
    stride_residual = 0
    if residual is not None:
        residual = residual.reshape(m, n)
        stride_residual = residual.stride(0)
    block = min(next_power_of_2(n), 1024)
    _scale_kernel[(m * cdiv(n, block),)](
        sums, scales if is_int else None, weight_scale, bias, residual, y, n, scales.stride(0),
        weight_scale.stride(0), stride_residual, activation, block,
    )  # fmt: skip
    return y.view(*x.shape[:-1], n)


def _chosen_backend(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> str:
    return str(choose(x, weight, weight_scale, out_dtype, backend)["backend"])


@op(scaled_mm_reference, backend=_chosen_backend)
def _scaled_mm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    require_fp8(x.device, x.dtype)
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    config = choose(x, weight, weight_scale, out_dtype, backend)
    if config["backend"] == "cublas":
        return _cublas(x, x_scale, weight, weight_scale, bias, activation, residual, out_dtype)
    blockwise = is_blockwise(weight, weight_scale)
    launch(config, x, x_scale, weight, weight_scale, bias, activation, y, residual, blockwise)
    return y


def scaled_mm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """Return ``act((x · x_scale) @ (weight · weight_scale).T + bias) + residual`` [..., N] in `out_dtype`.

    `x` [..., K] and `weight` [N, K] are both float8_e4m3fn or both int8, with float32 scales [..., 1]
    and [N, 1], or for float8 [..., ceil(K / 128)] and [ceil(N / 128), ceil(K / 128)], as `quantize_act`
    gives them. `bias` [N] is float32, float16 or bfloat16, `residual` [..., N] in `out_dtype`, one of
    the same. Rows may be strided; the last dimension is contiguous. `activation` is None, "silu",
    "gelu", "gelu_tanh" or "relu_squared". `backend` None runs what is fastest as far as known,
    "triton" and "cublas" insist.
    Raises TypeError or ValueError naming the argument that does not fit, and UnsupportedError for
    float8 on a GPU below sm_89, or where "cublas" has no such matmul.
    """
    _check_operands(x, x_scale, weight, weight_scale)
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
    n = weight.shape[0]
    if bias is not None:
        check_dtype("bias", bias, *FLOATS)
        check_shape("bias", bias, n)
        check_device("bias", bias, x.device)
        check_last_dim_contiguous("bias", bias)
    if residual is not None:
        check_dtype("residual", residual, out_dtype)
        check_shape("residual", residual, *x.shape[:-1], n)
        check_device("residual", residual, x.device)
        check_last_dim_contiguous("residual", residual)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {ACTIVATIONS}, got {activation!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return _scaled_mm(
        x, x_scale, weight, weight_scale, bias, activation, residual, out_dtype, backend
    )  # fmt: skip


def _check_operands(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    check_dtype("x", x, *LARGEST)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension to sum over, got shape {tuple(x.shape)}")
    check_dtype("weight", weight, x.dtype)
    check_shape("weight", weight, None, x.shape[-1])
    check_last_dim_contiguous("x", x)
    check_last_dim_contiguous("weight", weight)
    check_dtype("weight_scale", weight_scale, torch.float32)
    check_dtype("x_scale", x_scale, torch.float32)
    (n, k), columns = weight.shape, 1
    if x.dtype == torch.int8 or not is_blockwise(weight, weight_scale):
        check_shape("weight_scale", weight_scale, n, 1)
    else:
        columns = cdiv(k, GROUP)
        if weight_scale.shape != (cdiv(n, GROUP), columns):
            raise ValueError(
                f"weight_scale must have shape ({n}, 1) or ({cdiv(n, GROUP)}, {columns}), "
                f"got {tuple(weight_scale.shape)}"
            )
    check_shape("x_scale", x_scale, *x.shape[:-1], columns)
    check_last_dim_contiguous("x_scale", x_scale)
    check_last_dim_contiguous("weight_scale", weight_scale)
    for name, tensor in (("x_scale", x_scale), ("weight", weight), ("weight_scale", weight_scale)):
        check_device(name, tensor, x.device)
