import pytest
import torch

from tests.interpreter import interpret
from tests.kernels.launches import record_launches
from tlk.kernels import likeliest as module
from tlk.kernels._op import kernels_on_cpu
from tlk.kernels.likeliest import likeliest_, likeliest_reference, piece_columns
from tlk.kernels.sampling import sample_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
BLOCK = 16


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 columns, so that a short row has many tiles and pieces."""
    monkeypatch.setattr(module, "BLOCK", BLOCK)


def state_and_rows(n, device):
    """A state of some more rows than `n`, and different rows of it in no order."""
    generator = torch.Generator().manual_seed(n)
    rows = torch.randperm(n + 3, generator=generator)[:n]
    return torch.full((n + 3,), -7, device=device), rows.to(device)


def tokens_of(logits):
    """The tokens that the op finds, after a look at what it left in the state."""
    state, rows = state_and_rows(len(logits), logits.device)
    tokens = likeliest_(logits, state, rows)
    assert tokens.dtype == torch.int64
    expected = torch.full_like(state, -7)
    expected[rows] = tokens
    assert state.tolist() == expected.tolist()
    return tokens.tolist()


def naive(logits):
    """The first index of the largest logit in each row, in plain Python."""
    rows = [
        [-INF if x != x else min(x, 3.4028234663852886e38) for x in row] for row in logits.tolist()
    ]
    return [row.index(max(row)) for row in rows]


SPECIAL = [
    [0.0, 1.0, 3.0, 3.0, 2.0],
    [NAN, 1.0, NAN, 2.0, NAN],
    [-1.0, -0.0, 0.0, -0.0, -2.0],
    [-1.0, 0.0, -0.0, 0.0, NAN],
    [-INF, -INF, -3e38, -INF, NAN],
    [5.0, INF, 7.0, INF, NAN],
    [-INF] * 5,
    [NAN] * 5,
    [-INF, NAN, -INF, NAN, -INF],
    [-5.0, -4.0, -3.0, -4.0, -3.0],
    [1.0, torch.finfo(torch.float32).max, INF, 2.0, INF],
]


def test_reference():
    x = torch.tensor(SPECIAL)
    expected = [2, 3, 1, 1, 2, 1, 0, 0, 0, 2, 1]
    assert naive(x) == expected
    state, rows = state_and_rows(len(x), "cpu")
    assert likeliest_reference(x, state, rows).tolist() == expected
    assert state[rows].tolist() == expected and (state == -7).sum() == 3


def test_order_is_that_of_sample():
    x = torch.cat([torch.tensor(SPECIAL), torch.randn(20, 5).round()])
    n = len(x)
    zero, one = torch.zeros(n), torch.ones(n)
    tokens, _ = sample_reference(x, zero, zero.int(), one, zero, zero.long(), zero.long())
    assert likeliest_reference(x, *state_and_rows(n, "cpu")).tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "v"),
    [
        (1, 1),
        (3, 1),
        (2, 5),
        (1, 1000),
        (130, 1000),
        (3, 2049),
        (7, 32000),
        (1, 128256),
        (2, 50257),
    ],
)
def test_likeliest(n, v, dtype, device):
    x = torch.randn(n, v).to(dtype)  # 16-bit dtypes: the largest is often there twice
    assert tokens_of(x.to(device)) == naive(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_column_can_win(dtype, device, small_tiles):
    v = 5 * BLOCK + 3
    x = torch.full((v, v), -2.0).fill_diagonal_(-1.0).to(dtype)
    x = x.to(device)
    assert tokens_of(x) == list(range(v))  # of one piece, or of several for fewer rows
    assert [token for rows in x.split(16) for token in tokens_of(rows)] == list(range(v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, device, small_tiles):
    """Alone, and with each value in a tile of its own."""
    x = torch.tensor(SPECIAL).to(dtype)
    assert tokens_of(x.to(device)) == naive(x)
    spread = torch.full((len(x), 5 * BLOCK), -INF, dtype=dtype)
    spread[:, ::BLOCK] = x
    assert tokens_of(spread.to(device)) == naive(spread)


@pytest.mark.parametrize("value", [7.5, -7.5, 0.0])
def test_the_lowest_of_equals_wins(value, device, small_tiles):
    """Wherever the equals are: in a tile, in tiles of a piece, in pieces."""
    v, generator = 70 * BLOCK, torch.Generator().manual_seed(0)
    x = torch.full((12, v), value - 1)
    for row in x:
        row[torch.randint(0, v, (4,), generator=generator)] = value
    x[0, [BLOCK, 2 * BLOCK - 1]] = value
    x[1, [3, BLOCK + 2]] = value  # the later in the lower lane
    x[2, [v // 2 + 9, v - 8]] = value
    x[3] = value
    assert tokens_of(x.to(device)) == naive(x)


def test_a_row_has_the_same_token_in_any_batch_and_cut(small_tiles):
    x = torch.randint(0, 3, (130, 20 * BLOCK + 5)).float() - 2.0
    x[5], x[6, :300], x[7, 3] = -INF, -INF, NAN
    expected, cuts = naive(x), set()
    for sm_count in (1, 4, 8):
        for n in (1, 9, 130) if sm_count == 8 else (1, 9):
            cuts.add(piece_columns(n, x.shape[1], sm_count))
            with interpret(), kernels_on_cpu(90, sm_count):
                assert tokens_of(x[:n]) == expected[:n]
    assert len(cuts) >= 4


def test_rows_may_be_strided(device, small_tiles):
    wide = torch.full((5, 4, 100), 9.0)
    wide[:, 2, 3:90] = torch.randn(5, 87)
    x = wide.to(device)[:, 2, 3:90]
    assert x.stride(0) == 400
    assert tokens_of(x) == naive(wide[:, 2, 3:90])
    one = torch.randn(87)
    assert tokens_of(one.to(device).expand(3, 87)) == naive(one.expand(3, 87))


def test_pieces_fill_the_gpu_and_cover_the_row():
    for sms in (8, 132, 170):
        for n in (1, 2, 3, 8, 33, 128, 130, 511, 1057, 5000):
            for v in (1, 5, 2048, 2049, 32000, 50257, 128256, 262144, 2_000_000):
                columns = piece_columns(n, v, sms)
                pieces = -(-v // columns)
                assert columns % module.BLOCK == 0 and columns > 0
                assert 1 <= pieces <= module.PIECES
                short = pieces == module.PIECES or columns <= 16 * module.BLOCK
                assert short or v > 16 * module.BLOCK * module.PIECES
                assert n * pieces <= 8 * sms or columns >= 8 * module.BLOCK or columns >= v
    assert piece_columns(1, 128256, 132) == 2048
    assert piece_columns(128, 128256, 132) == 8 * 2048


def test_two_launches(device, monkeypatch):
    pieces = record_launches(monkeypatch, module, "_pieces_kernel")
    rows = record_launches(monkeypatch, module, "_likeliest_kernel")
    tokens_of(torch.randn(3, 10000, device=device))
    assert pieces == [(3, 5)] and rows == [(3,)]


def test_no_rows(device):
    state = torch.zeros(4, dtype=torch.int64, device=device)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    assert likeliest_(torch.zeros(0, 9, device=device), state, empty).shape == (0,)


def test_registration(device):
    x = torch.randn(3, 100, device=device)
    args = (x, *state_and_rows(3, device))
    torch.library.opcheck(torch.ops.tlk.likeliest_.default, args)
    compiled = torch.compile(likeliest_, fullgraph=True, backend="aot_eager")
    assert compiled(*args).tolist() == x.argmax(-1).tolist() == args[1][args[2]].tolist()


def test_bad_input_is_refused():
    def refuses(error, message, **change):
        args = {
            "logits": torch.zeros(2, 5),
            "state": torch.zeros(4, dtype=torch.int64),
            "rows": torch.zeros(2, dtype=torch.int64),
        }
        with pytest.raises(error, match=message):
            likeliest_(**args | change)

    long = torch.zeros(4, dtype=torch.int64)
    refuses(TypeError, "logits must be float32 or .*, got int64", logits=torch.zeros(2, 5).long())
    refuses(ValueError, r"logits must have shape \(any, any\)", logits=torch.zeros(5))
    refuses(ValueError, "logits must have stride 1", logits=torch.zeros(5, 2).T)
    refuses(ValueError, "logits must have at least one column", logits=torch.zeros(2, 0))
    refuses(TypeError, "state must be int64, got int32", state=long.int())
    refuses(ValueError, r"state must have shape \(any\)", state=long[None])
    refuses(ValueError, "state must be on cpu", state=long.to("meta"))
    refuses(ValueError, "state must have stride 1", state=long[::2])
    refuses(TypeError, "rows must be int64, got int32", rows=long[:2].int())
    refuses(ValueError, r"rows must have shape \(2\), got \(4,\)", rows=long)
    refuses(ValueError, "rows must be on cpu", rows=long[:2].to("meta"))
    refuses(ValueError, "rows must have stride 1", rows=long[::2])
