"""Choose the next token: penalties, temperature, top-k, top-p, min-p, the draw, and log-probabilities.

    kept = { v : x[v] >= threshold(top-k, then top-p among what is left, then min-p) }
    token = argmax over kept of  x[v] / temperature + g[v]

The draw is Gumbel-max (Gumbel 1954; Maddison et al., https://arxiv.org/abs/1411.0030): with g Gumbel
noise the winner has the softmax distribution over what is kept. g depends on the request's seed and
offset and on v only (`_philox.py`), so a request draws the same tokens alone or in any batch, and the
reference draws what the kernel draws, unless two scores are equal to some 1e-6.

The filters come in the order of vLLM and transformers and keep all tokens that equal a threshold
(`_threshold.py`). NaN counts as -inf, +inf as the largest float32. A row without any logit above -inf
gives token 0 and log-probability -inf.

Plan of `sample`, two launches and no sort. The first reads the rows at bandwidth, whatever their
number, and leaves two or three sums of each span of 64 columns or so (`_spans.py`). In the second, one
program a row holds the sums of its 2048 spans. Top-k: the k-th largest of the spans' largest logits
bounds the threshold from below, and some k spans reach it; the few logits that do are listed, searched
and drawn from. Without top-k, a token is drawn before any threshold is known, and what top-p or min-p
does not keep is refused (`_draw.py`). S·V·itemsize bytes, some 15 instructions a logit; with top-p, of
what may lie above its token a row reads as much again as decides. Rows whose list overflows (k near
1000, or as many equal logits) cost some 12 passes by one program.
`top_logprobs` is the same two launches and lists as `sample` does.
`apply_penalties_` moves 13·S·V bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlk.kernels._check import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from tlk.kernels._draw import draw_by_refusals, draw_of_top_k, draw_reference
from tlk.kernels._ints import cdiv, next_power_of_2
from tlk.kernels._op import op
from tlk.kernels._pdl import allow_next, pdl, wait_for_previous
from tlk.kernels._philox import QUARTER, gumbel_reference
from tlk.kernels._spans import (
    _spans_kernel,
    bound_key,
    collect,
    listed,
    row_of_spans,
    span_count,
    span_width,
    tile_spans,
)
from tlk.kernels._threshold import (
    cleaned,
    floor_reference,
    load_row,
    threshold_reference,
    value_of,
)


def sample_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = cleaned(logits)
    tokens = x.argmax(-1)
    filtered = (top_k > 0) & (top_k < x.shape[-1])
    for rows, draw in ((filtered, _drawn_by_score), (~filtered, _drawn_by_mass)):
        rows = rows & (temperature > 0)
        if rows.any():
            settings = (s[rows] for s in (temperature, top_k, top_p, min_p, seeds, offsets))
            tokens[rows] = draw(x[rows], *settings)
    return tokens, _token_logprobs(x, tokens)


def _drawn_by_score(
    x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, offsets: Tensor,
) -> Tensor:  # fmt: skip
    """The largest of logits and noise of those that the filters keep."""
    t = threshold_reference(x, temperature, top_k, top_p, min_p)
    inverse = 1 / temperature.clamp(1e-30, 1e30)
    score = (x - x.amax(-1, keepdim=True)) * inverse[:, None]
    score += gumbel_reference(seeds, offsets, x.shape[-1])
    return torch.where(x >= t[:, None], score, -torch.inf).argmax(-1)


def _drawn_by_mass(
    x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, offsets: Tensor,
) -> Tensor:  # fmt: skip
    """A span of columns, then one of its tokens, until the filters keep it."""
    t = threshold_reference(x, temperature, top_k, top_p, min_p)
    inverse = 1 / temperature.clamp(1e-30, 1e30)
    return draw_reference(x, t, floor_reference(x, temperature, min_p), inverse, seeds, offsets)


def _fake_sample(logits: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    n_rows = logits.shape[0]
    return (
        logits.new_empty(n_rows, dtype=torch.int64),
        logits.new_empty(n_rows, dtype=torch.float32),
    )


def apply_penalties_reference(
    logits: Tensor, prompt_mask: Tensor, output_counts: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, rows: Tensor | None = None,
) -> None:  # fmt: skip
    if rows is not None:
        none = rows[:, None] < 0
        prompt_mask = prompt_mask[rows.clamp(min=0)] & ~none
        output_counts = output_counts[rows.clamp(min=0)].masked_fill(none, 0)
    repetition, output = repetition[:, None], output_counts > 0
    x = torch.where(logits > 0, logits / repetition, logits * repetition)
    x = torch.where(prompt_mask | output, x, logits)
    logits.copy_(x - (presence[:, None] * output + frequency[:, None] * output_counts))


def top_logprobs_reference(logits: Tensor, tokens: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    x = cleaned(logits)
    values, ids = x.sort(dim=-1, descending=True, stable=True)
    ids = ids[:, :n].where(values[:, :n] > -torch.inf, -1)
    values = _logprobs(x).gather(-1, ids.clamp(min=0)).where(ids >= 0, -torch.inf)
    return _token_logprobs(x, tokens), ids, values


def _logprobs(x: Tensor) -> Tensor:
    return torch.where(x > -torch.inf, x.log_softmax(-1), -torch.inf)


def _token_logprobs(x: Tensor, tokens: Tensor) -> Tensor:
    inside = (tokens >= 0) & (tokens < x.shape[-1])
    value = _logprobs(x).gather(-1, tokens.where(inside, 0)[:, None])[:, 0]
    return value.where(inside, -torch.inf)


@triton.jit
def _sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, offsets_ptr,
    sums_ptr, lists_ptr, tokens_ptr, logprobs_ptr, stride, n_cols, n_spans,
    SHIFT: tl.constexpr, QUARTER: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr,
    TILE: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    sums_ptr += row * 4 * n_spans
    wait_for_previous(PDL)
    tops, top, total = row_of_spans(sums_ptr, n_spans, SPANS)
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    seed, offset = tl.load(seeds_ptr + row), tl.load(offsets_ptr + row)
    list_ptr = lists_ptr + row * (MOST + SPANS)
    if temperature <= 0:
        token = _first_of_the_largest(row_ptr, tops, n_cols, WIDTH, SPANS)
    elif (top_k <= 0) | (top_k >= n_cols):
        token = draw_by_refusals(
            row_ptr, sums_ptr, list_ptr, tops, top, n_cols, n_spans, temperature, top_p, min_p,
            seed, offset, SHIFT, WIDTH, SPANS, 2 * TILE,
        )  # fmt: skip
    else:
        token = draw_of_top_k(
            row_ptr, list_ptr, tops, top, n_cols, temperature, top_k, top_p, min_p, seed, offset,
            SHIFT, QUARTER, WIDTH, SPANS, TILE, MOST, BLOCK,
        )  # fmt: skip
    x = load_row(row_ptr, token, n_cols)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(
        logprobs_ptr + row, tl.where(x > float("-inf"), x - top - tl.log(tl.maximum(total, 1.0)), x)
    )


@triton.jit
def _first_of_the_largest(row_ptr, tops, n_cols, WIDTH: tl.constexpr, SPANS: tl.constexpr):
    largest = tl.max(tops, 0)
    span = tl.min(tl.where(tops == largest, tl.arange(0, SPANS), SPANS), 0)
    columns = span * WIDTH + tl.arange(0, WIDTH)
    return tl.min(tl.where(load_row(row_ptr, columns, n_cols) == largest, columns, n_cols), 0)


@triton.jit
def _apply_penalties_kernel(
    logits_ptr, mask_ptr, counts_ptr, repetition_ptr, presence_ptr, frequency_ptr, rows_ptr,
    logits_stride, mask_stride, counts_stride, n_cols, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    state = row
    if rows_ptr is not None:
        state = tl.load(rows_ptr + row)
    repetition = tl.load(repetition_ptr + row)
    presence, frequency = tl.load(presence_ptr + row), tl.load(frequency_ptr + row)
    if (state >= 0) & ((repetition != 1) | (presence != 0) | (frequency != 0)):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < n_cols
        logits_ptr += row * logits_stride
        x = tl.load(logits_ptr + cols, inside, other=0.0)
        prompt = tl.load(mask_ptr + state * mask_stride + cols, inside, other=0)
        counts = tl.load(counts_ptr + state * counts_stride + cols, inside, other=0)
        penalized = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        y = tl.where((prompt != 0) | (counts > 0), penalized, x)
        y -= tl.where(counts > 0, presence, 0.0) + frequency * counts.to(tl.float32)
        tl.store(logits_ptr + cols, y, inside)


@triton.jit
def _top_logprobs_kernel(
    logits_ptr, tokens_ptr, sums_ptr, lists_ptr, token_logprobs_ptr, ids_ptr, logprobs_ptr, stride,
    n_cols, n_spans, n, SHIFT: tl.constexpr, WIDTH: tl.constexpr, SPANS: tl.constexpr,
    TILE: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    list_ptr = lists_ptr + row * (MOST + SPANS)
    wait_for_previous(PDL)
    tops, top, total = row_of_spans(sums_ptr + row * 4 * n_spans, n_spans, SPANS)
    log_mass = tl.log(tl.maximum(total, 1.0))
    x = load_row(row_ptr, tl.load(tokens_ptr + row), n_cols)
    tl.store(token_logprobs_ptr + row, tl.where(x > float("-inf"), x - top - log_mass, x))
    bound = value_of(bound_key(tops, top, n, SHIFT), SHIFT)
    count = collect(row_ptr, list_ptr, tops, bound, n_cols, WIDTH, SPANS, TILE, MOST)
    x, columns = listed(row_ptr, list_ptr, tl.minimum(count, MOST), n_cols, MOST)
    value, column = float("inf"), n_cols
    for i in range(n):
        if count <= MOST:
            value = tl.max(x, 0)
            column = tl.min(tl.where(x == value, columns, n_cols), 0)
            x = tl.where(columns == column, float("-inf"), x)
        else:
            value, column = _next_of_row(row_ptr, n_cols, value, column, BLOCK)
        exists = value > float("-inf")
        tl.store(ids_ptr + row * n + i, tl.where(exists, column, -1).to(tl.int64))
        tl.store(logprobs_ptr + row * n + i, tl.where(exists, value - top - log_mass, value))


@triton.jit
def _next_of_row(row_ptr, n_cols, value, column, BLOCK: tl.constexpr):
    """The largest logit after (`value`, `column`), and its column: the lowest one first of equals."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    found = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = load_row(row_ptr, columns, n_cols)
        after = (x < value) | ((x == value) & (columns > column))
        over = after & (x > best)
        best, found = tl.where(over, x, best), tl.where(over, columns, found)
    value = tl.max(best, 0)
    return value, tl.min(tl.where(best == value, found, n_cols), 0)


MOST = 1024  # logits that a program lists and holds
BLOCK = 4096  # columns of a tile of a row that is read whole


# Bits of a float32 that logits of a 16-bit dtype never set.
_UNUSED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def _measure(
    logits: Tensor, temperature: Tensor | None = None, top_k: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Launch the sums of all spans; return them, room for lists, and constants of the next launch."""
    n_rows, n_cols = logits.shape
    width, n_spans, dependent = span_width(n_cols), span_count(n_cols), pdl(logits.device)
    tile, spans = tile_spans(n_cols), next_power_of_2(n_spans)
    columns = max(next_power_of_2(n_cols), 128)
    most, block = min(MOST, columns), min(BLOCK, max(columns, 2048))
    sums = torch.empty(n_rows, 4, n_spans, dtype=torch.float32, device=logits.device)
    lists = torch.empty(n_rows, most + spans, dtype=torch.int32, device=logits.device)
    _spans_kernel[(n_rows, n_spans // tile)](
        logits, temperature, top_k, sums, logits.stride(0), n_cols, n_spans,
        WIDTH=width, TILE=tile, PDL=dependent, num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    return sums, lists, {
        "SHIFT": _UNUSED_BITS[logits.dtype], "WIDTH": width, "SPANS": spans, "TILE": tile,
        "MOST": most, "BLOCK": block, "PDL": dependent, "num_warps": 16 if most >= 1024 else 8,
        "launch_pdl": dependent,
    }  # fmt: skip


@op(sample_reference, fake=_fake_sample)
def _sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_rows, n_cols = logits.shape
    tokens = torch.empty(n_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        sums, lists, constants = _measure(logits, temperature, top_k)
        _sample_kernel[(n_rows,)](
            logits, temperature, top_k, top_p, min_p, seeds, offsets, sums, lists, tokens, logprobs,
            logits.stride(0), n_cols, sums.shape[2], QUARTER=QUARTER, **constants,
        )  # fmt: skip
    return tokens, logprobs


@op(apply_penalties_reference, mutates=("logits",))
def _apply_penalties_(
    logits: Tensor, prompt_mask: Tensor, output_counts: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, rows: Tensor | None = None,
) -> None:  # fmt: skip
    n_rows, n_cols = logits.shape
    block = min(max(next_power_of_2(n_cols), 128), 1024)
    if n_rows:
        _apply_penalties_kernel[(n_rows, cdiv(n_cols, block))](
            logits, prompt_mask.view(torch.uint8), output_counts, repetition, presence, frequency,
            rows, logits.stride(0), prompt_mask.stride(0), output_counts.stride(0), n_cols,
            BLOCK=block, num_warps=max(block // 256, 1),
        )  # fmt: skip


@op(top_logprobs_reference)
def _top_logprobs(logits: Tensor, tokens: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_cols = logits.shape
    logprobs = torch.empty(n_rows, n, dtype=torch.float32, device=logits.device)
    ids = torch.empty(n_rows, n, dtype=torch.int64, device=logits.device)
    token_logprobs = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        sums, lists, constants = _measure(logits)
        _top_logprobs_kernel[(n_rows,)](
            logits, tokens, sums, lists, token_logprobs, ids, logprobs, logits.stride(0), n_cols,
            sums.shape[2], n, **constants,
        )  # fmt: skip
    return token_logprobs, ids, logprobs


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw a token for every row of `logits` [S, V] and return (tokens, logprobs).

    All other arguments are [S]: `temperature` float32, 0 or less takes the largest logit (the lowest
    index if several are equal); `top_k` int32, 0 or less is off; `top_p` float32, 1 or more is off;
    `min_p` float32, 0 or less is off; `seeds` and `offsets` int64 number the draw: a request keeps its
    seed and passes the position of the token as its offset.

    Returns tokens [S] int64 and logprobs [S] float32, the log-softmax of the logits as given, before
    temperature and filters, at the token.

    Raises TypeError for other dtypes and ValueError for other shapes, devices or strides.
    """
    _check_rows(logits, FLOATS)
    _check_vectors(logits, torch.float32, temperature=temperature, top_p=top_p, min_p=min_p)
    _check_vectors(logits, torch.int32, top_k=top_k)
    _check_vectors(logits, torch.int64, seeds=seeds, offsets=offsets)
    return _sample(logits, temperature, top_k, top_p, min_p, seeds, offsets)


def apply_penalties_(
    logits: Tensor, prompt_mask: Tensor, output_counts: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, *, rows: Tensor | None = None,
) -> None:  # fmt: skip
    """Penalize in place the `logits` [S, V] of tokens that have occurred.

    The logits are float32, as in transformers: 16-bit logits must be converted first, for rounding
    them again after a penalty could change their order.

    `prompt_mask` [S, V] bool marks the tokens of the prompt, `output_counts` [S, V] int32 counts those
    generated since. `rows` [S] int64 says which rows of the two, then [R, V], belong to each row of
    logits; -1: none, the logits stay. `repetition` [S] (Keskar et al.,
    https://arxiv.org/abs/1909.05858; 1 is off) divides positive and multiplies negative logits of
    tokens in either; `presence` [S] is subtracted once and `frequency` [S] once per occurrence from
    generated tokens, as OpenAI's API does (0 is off). The three are float32. Rows without any penalty
    are not read.

    Raises TypeError for other dtypes and ValueError for other shapes, devices or strides.
    """
    _check_rows(logits, (torch.float32,))
    count = logits.shape[0] if rows is None else None
    for name, like, dtype in (
        ("prompt_mask", prompt_mask, torch.bool),
        ("output_counts", output_counts, torch.int32),
    ):
        check_dtype(name, like, dtype)
        check_shape(name, like, count, logits.shape[1])
        check_device(name, like, logits.device)
        check_last_dim_contiguous(name, like)
    _check_vectors(
        logits, torch.float32, repetition=repetition, presence=presence, frequency=frequency
    )
    if rows is not None:
        _check_vectors(logits, torch.int64, rows=rows)
    _apply_penalties_(logits, prompt_mask, output_counts, repetition, presence, frequency, rows)


def top_logprobs(logits: Tensor, tokens: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of `logits` [S, V] at `tokens` [S] int64, and its `n` largest values.

    Returns (token_logprobs [S] float32, top_ids [S, n] int64, top_logprobs [S, n] float32), largest
    first and the lower id first among equals. Tokens of probability zero are not listed: id -1 and
    -inf fill their places. A token outside of the vocabulary gets -inf.

    Raises TypeError for other dtypes and ValueError for other shapes, devices, strides or `n`.
    """
    _check_rows(logits, FLOATS)
    _check_vectors(logits, torch.int64, tokens=tokens)
    if not 0 <= n <= logits.shape[1]:
        raise ValueError(f"n must be between 0 and {logits.shape[1]}, got {n}")
    return _top_logprobs(logits, tokens, n)


def _check_rows(logits: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_dtype("logits", logits, *dtypes)
    check_shape("logits", logits, None, None)
    check_last_dim_contiguous("logits", logits)
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one column, got {tuple(logits.shape)}")


def _check_vectors(logits: Tensor, dtype: torch.dtype, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        check_dtype(name, vector, dtype)
        check_shape(name, vector, logits.shape[0])
        check_device(name, vector, logits.device)
        check_last_dim_contiguous(name, vector)
