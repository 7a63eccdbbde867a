import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.kernels.check import check
from tests.kernels.launches import record_launches
from tlk.kernels import _spans, sampling
from tlk.kernels._philox import gumbel_reference, philox_reference
from tlk.kernels._threshold import threshold_reference
from tlk.kernels.sampling import (
    apply_penalties_,
    apply_penalties_reference,
    sample,
    sample_reference,
    top_logprobs,
    top_logprobs_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OFF = (1.0, 0, 1.0, 0.0)
# temperature, top_k, top_p, min_p: each filter alone and together
SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    OFF,
    (0.7, 5, 1.0, 0.0),
    (1.0, 7, 0.8, 0.0),
    (1.5, 200, 0.9, 0.02),
    (2.0, 0, 0.95, 0.0),
    (0.3, 0, 0.6, 0.0),
    (1.3, 0, 1.0, 0.1),
    (4.0, 0, 0.99, 0.001),
    (1.0, 120, 1.0, 0.0),
]


@pytest.fixture(params=[16, 1024])
def small_tiles(request, monkeypatch):
    """Tiles of 16 spans, so that a short row has several; lists that hold what is left, or not."""
    monkeypatch.setattr(_spans, "COLUMNS", 256)
    monkeypatch.setattr(sampling, "BLOCK", 512)
    monkeypatch.setattr(sampling, "MOST", request.param)


def requests(settings, device, seed=0):
    """The arguments after the logits, a row for each of `settings`, with varied seeds and offsets."""
    random = torch.Generator().manual_seed(seed)
    t, k, p, m = (torch.tensor(column) for column in zip(*settings, strict=True))
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(t),), generator=random)
    offsets = torch.randint(0, 2**40, (len(t),), generator=random)
    args = (t.float(), k.int(), p.float(), m.float(), seeds, offsets)
    return tuple(a.to(device) for a in args)


def agrees(logits, args):
    """The kernel's tokens and log-probabilities are the reference's; returns the tokens."""
    tokens, logprobs = sample(logits, *args)
    cpu = logits.cpu()
    want, want_logprobs = sample_reference(cpu, *(a.cpu() for a in args))
    assert tokens.tolist() == want.tolist()
    torch.testing.assert_close(logprobs.cpu(), want_logprobs, rtol=1e-5, atol=1e-5)
    return want


def test_philox_gives_the_published_words():
    # known answers of the Random123 library, philox4x32-10
    cases = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, words in cases:
        got = philox_reference([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert [int(w) for w in got] == words


def test_noise_is_gumbel_and_independent_of_the_batch():
    seeds, offsets = torch.tensor([3, 3, -4]), torch.tensor([0, 1, 2**35])
    noise = gumbel_reference(seeds, offsets, 50_000)
    assert noise.isfinite().all()
    for row in range(3):
        alone = gumbel_reference(seeds[row : row + 1], offsets[row : row + 1], 300)
        assert torch.equal(alone[0], noise[row, :300])
        assert len(noise[row].unique()) > 49_900
    # mean is Euler's constant, variance pi²/6; five standard errors
    assert (noise.mean(-1) - 0.5772).abs().max() < 0.03
    assert (noise.var(-1) - 1.6449).abs().max() < 0.1
    upper = noise.sort(-1, descending=True).values[:, 500]
    assert (upper - 4.6002).abs().max() < 0.25  # -log(-log(0.99))
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.03


@pytest.mark.parametrize("t, k, p, m", SETTINGS[1:])
def test_reference_keeps_what_transformers_keeps(t, k, p, m):
    logits = torch.randn(6, 400) * torch.tensor([[0.1], [0.5], [1], [2], [4], [8]])
    chain = LogitsProcessorList([TemperatureLogitsWarper(t)])
    if k:
        chain.append(TopKLogitsWarper(k))
    if p < 1:
        chain.append(TopPLogitsWarper(p))
    if m:
        chain.append(MinPLogitsWarper(m))
    want = chain(torch.zeros(6, 1, dtype=torch.long), logits.clone()) > -torch.inf
    threshold = threshold_reference(logits, *requests([(t, k, p, m)] * 6, "cpu")[:4])
    assert torch.equal(logits >= threshold[:, None], want)


@pytest.mark.parametrize("t, k, p, m", [OFF, (0.5, 0, 1.0, 0.0), (2.0, 20, 0.9, 0.02)])
def test_reference_draws_with_the_right_frequencies(t, k, p, m):
    n, logits = 20_000, torch.randn(40) * 2
    rows = requests([(t, k, p, m)], "cpu")[:4]
    threshold = threshold_reference(logits[None], *rows)
    probability = torch.where(logits >= threshold, logits / t, -torch.inf).softmax(-1)
    # half of the draws by seed, half by offset, as a request and a batch of requests count them
    seeds = torch.arange(n).clamp(max=n // 2)
    offsets = (torch.arange(n) - n // 2).clamp(min=0)
    args = [a.expand(n) for a in rows]
    tokens, _ = sample_reference(logits.expand(n, -1), *args, seeds, offsets)
    counts = torch.bincount(tokens, minlength=40)
    assert (counts[probability == 0] == 0).all()
    expected = n * probability[probability > 0]
    chi2 = ((counts[probability > 0] - expected).square() / expected).sum()
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", [60, 517])
def test_sample(dtype, n_cols, device, small_tiles):
    scale = torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0, 1.0, 4.0, 2.0, 1.0, 3.0])[:, None]
    logits = (torch.randn(10, n_cols) * scale).to(device, dtype)
    agrees(logits, requests(SETTINGS, device))


def test_sample_from_a_vocabulary(device):
    """The default configuration: 33,000 columns are several tiles, and four groups of random words."""
    logits = torch.randn(4, 33_000, device=device)
    agrees(logits, requests([(1.0, 50, 0.9, 0.0), (1.0, 0, 0.9, 0.0), OFF, (0.0, 0, 1, 0)], device))


def test_kernel_draws_every_kept_token_and_no_other(device, small_tiles):
    logits = torch.randn(200).to(device).expand(36, -1)
    args = requests([(5.0, 9, 0.75, 0.3)] * 36, device)
    threshold = threshold_reference(logits[:1].cpu(), *(a[:1].cpu() for a in args[:4]))
    kept = (logits[0].cpu() >= threshold).nonzero().flatten().tolist()
    assert len(kept) == 7  # by top-p; top-k alone keeps 9
    assert sorted(set(agrees(logits, args).tolist())) == kept


def test_refused_tokens_are_drawn_again(device, small_tiles):
    """Little of a flat row is kept, so that most first tokens are refused, and some several times."""
    logits = torch.randn(12, 5000, device=device)
    agrees(
        logits, requests([(3.0, 0, 0.05, 0.0), (1.0, 0, 0.3, 0.0), (9.0, 0, 1.0, 0.8)] * 4, device)
    )


def test_what_min_p_refuses_does_not_come_again(device):
    logits = torch.randn(8, 5000, device=device)
    agrees(logits, requests([(9.0, 0, 1.0, 0.8)] * 8, device, seed=1))


def test_tokens_do_not_depend_on_the_batch(device, small_tiles):
    logits = torch.randn(6, 300, device=device) * 2
    args = requests(SETTINGS[2:8], device)
    order = torch.tensor([4, 0, 5, 2, 1, 3], device=device)
    tokens, logprobs = sample(logits, *args)
    shuffled, shuffled_logprobs = sample(logits[order], *(a[order] for a in args))
    assert torch.equal(shuffled, tokens[order])
    assert torch.equal(shuffled_logprobs, logprobs[order])
    alone, _ = sample(logits[3:4], *(a[3:4] for a in args))
    assert torch.equal(alone, tokens[3:4])


def test_greedy_takes_the_first_of_the_largest(device, small_tiles):
    logits = torch.randn(4, 300, device=device)
    logits[0, [7, 9, 70, 71, 299]] = 5.0
    logits[1, [199, 135, 64]] = 5.0
    logits[2, 299] = 5.0
    args = requests([(0.0, 3, 0.5, 0.5), (-1.0, 0, 1, 0), (0.0, 0, 1, 0), (0.0, 0, 1, 0)], device)
    tokens = agrees(logits, args)
    assert tokens[:3].tolist() == [7, 64, 299]
    assert tokens[3] == logits[3].argmax()


@pytest.mark.parametrize(
    "setting",
    [
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 1e-9, 0.0),
        (1.0, 0, 0.0, 0.0),
        (1.0, 0, 1.0, 1.0),
        (1.0, 0, 1.0, 7.0),
        (1e-20, 0, 1.0, 0.0),
    ],
    ids=str,
)
def test_one_token_is_left(setting, device, small_tiles):
    logits = torch.randn(3, 150, device=device)
    assert agrees(logits, requests([setting] * 3, device)).tolist() == logits.argmax(-1).tolist()


def test_ties_at_a_threshold_are_all_kept(device, small_tiles):
    values = torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0])
    settings = [(1.0, 3, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 6, 0.999, 0.0), (1.0, 0, 1.0, 0.3)]
    # mass: 40.2 of 3, 22.2 of 2, 5.4 of 1, 1 of 0: half is in the 3s, 0.999 takes all of top-k's 7
    kept = [5, 2, 7, 5]
    rows = requests(settings, "cpu")[:4]
    threshold = threshold_reference(values.expand(4, -1), *rows)
    assert (values >= threshold[:, None]).sum(-1).tolist() == kept
    # more equals than a list holds
    logits = values.repeat(80).to(device)[torch.randperm(640, device=device)].expand(15, -1)
    settings = [(9.0, 200, 1.0, 0.0), (9.0, 0, 0.5, 0.0), (9.0, 300, 0.9, 0.0), (9.0, 0, 1.0, 0.8)]
    agrees(logits, requests([*settings, (9.0, 600, 1.0, 0.8)] * 3, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_are_drawn_evenly(dtype, device, small_tiles):
    logits = torch.full((2, 1000), -7.5, device=device, dtype=dtype)
    tokens = agrees(logits, requests([(1.0, 3, 0.5, 0.5), (1e25, 0, 1.0, 0.0)], device))
    assert len(set(tokens.tolist())) == 2


def test_largest_logits_in_one_span(device, small_tiles):
    """The top 12 share a span of 16, so that the largest of 12 spans say little of the threshold."""
    logits = torch.randn(800)
    logits[32:45] = 9 - 0.1 * torch.randperm(13)
    settings = [(9.0, 12, 1.0, 0.0), (9.0, 0, 0.99, 0.0), (9.0, 12, 0.3, 0.0)]
    # of the 12, e^-0.1 apart, 0.3 of the mass is in three
    settings += [(1.0, 12, 0.3, 0.0)] * 5 + [(9.0, 12, 0.3, 0.0)] * 2
    agrees(logits.expand(10, -1).to(device), requests(settings, device))


def test_top_p_of_what_top_k_left(device, small_tiles):
    """Of 40 logits listed for two spans, top-k leaves two: half of their mass is the first."""
    logits = torch.full((12, 64), -torch.inf, device=device)
    logits[:, :16] = 0.0
    logits[:, [3, 5]] = torch.tensor([1.0, 0.9], device=device)
    logits[:, 20] = 0.0
    tokens = agrees(logits, requests([(1.0, 2, 0.5, 0.0)] * 12, device))
    assert tokens.tolist() == [3] * 12


@pytest.mark.parametrize("k", [9, 100])
def test_what_top_k_left_is_filtered_at_temperature(k, device, small_tiles):
    logits = torch.randn(12, 300, device=device)
    agrees(logits, requests([(3.0, k, 1.0, 0.9), (9.0, k, 0.5, 0.0)] * 6, device))


def test_a_span_that_is_just_above_a_token_counts(device, small_tiles):
    """All spans have logits of two neighbouring values, and the larger one's mass is enough."""
    logits = torch.ones(8, 320, dtype=torch.bfloat16, device=device)
    logits[:, ::2] = 1.0078125
    tokens = agrees(logits, requests([(1.0, 0, 0.3, 0.0)] * 8, device))
    assert (tokens % 2 == 0).all()


def test_top_k_of_more_than_the_spans_that_have_logits(device, small_tiles):
    logits = torch.full((12, 640), -torch.inf, device=device)
    logits[:, 64:80], logits[:, 300] = torch.randn(16), 3.0
    agrees(logits, requests([(9.0, 11, 1.0, 0.0), (50.0, 30, 0.99, 0.0)] * 6, device))


def test_one_top_k_for_each_span(device, small_tiles):
    """The least of the spans' largest logits is the threshold."""
    logits = torch.full((12, 640), -torch.inf, device=device)
    logits[:, [70, 300]] = torch.tensor([1.0, 1.5], device=device)
    tokens = agrees(logits, requests([(9.0, 2, 1.0, 0.0)] * 12, device))
    assert set(tokens.tolist()) == {70, 300}


def test_top_k_of_the_whole_row_is_none(device, small_tiles):
    logits = torch.randn(1, 300, device=device).expand(16, -1)
    kept = [(5.0, k, 0.9, 0.0) for k in (0, -1, 300, 301)] * 4
    agrees(logits, requests(kept, device))


def test_masked_tokens_are_never_drawn(device, small_tiles):
    logits = torch.randn(6, 700, device=device)
    allowed = torch.zeros(700, dtype=torch.bool, device=device)
    allowed[[3, 64, 131, 699]] = True
    logits[:, ~allowed] = -torch.inf
    settings = [OFF, (1.0, 10, 1.0, 0.0), (1e20, 0, 0.9, 0.0), (1.0, 3, 0.9, 0.1), (0, 0, 1, 0)]
    tokens = agrees(logits, requests([*settings, (1.0, 0, 1.0, 1e-9)], device))
    assert allowed[tokens.to(device)].all()


def test_invalid_logits(device, small_tiles):
    nan, inf = torch.nan, torch.inf
    logits = torch.randn(6, 100, device=device)
    logits[0, 4:] = nan  # never drawn
    logits[1, 60] = inf  # always drawn
    logits[2] = -inf
    logits[3] = nan
    logits[4, [9, 80]] = inf
    logits[5] = -inf
    settings = [OFF, (1.0, 5, 0.9, 0.1), (1.0, 5, 0.9, 0.1), OFF, (1.0, 0, 0.9, 0.0), (0, 0, 1, 0)]
    tokens = agrees(logits, requests(settings, device))
    assert tokens[0] < 4 and tokens[1] == 60 and tokens[4] in (9, 80)
    assert tokens[[2, 3, 5]].tolist() == [0, 0, 0]
    logprobs = sample(logits, *requests(settings, device))[1]
    assert logprobs[[2, 3, 5]].tolist() == [-inf] * 3


def test_invalid_logits_where_tokens_are_refused(device, small_tiles):
    logits = torch.randn(8, 2000, device=device)
    logits[:, ::7] = torch.nan
    logits[:, 1::7] = -torch.inf
    agrees(logits, requests([(3.0, 0, 0.05, 0.0), (1.0, 0, 0.3, 0.1)] * 4, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:overflow")  # numpy says what the interpreter's floats do
def test_large_logits(dtype, device, small_tiles):
    largest = torch.finfo(dtype).max
    logits = torch.randn(5, 300, device=device).mul(1e4).to(dtype)
    logits[1, ::2] = -largest
    logits[2] = -largest
    logits[2, 100] = largest
    logits[3] *= 0
    logits[3, ::3] = -0.0
    settings = [(500.0, 0, 0.9, 0.0), (9e3, 100, 0.9, 0.0), (1.0, 9, 0.9, 0.0), (1.0, 9, 0.9, 0.1)]
    agrees(logits, requests([*settings, (1e4, 0, 1.0, 0.01)], device))


def test_sample_reads_a_slice_of_wider_rows(device, small_tiles):
    padded = torch.full((3, 256), torch.nan, device=device)
    padded[:, :201] = torch.randn(3, 201, device=device)
    padded[:, 201:] = 50.0
    agrees(padded[:, :201], requests(SETTINGS[2:5], device))


def test_no_rows(device):
    logits = torch.empty(0, 10, device=device)
    tokens, logprobs = sample(logits, *(a[:0] for a in requests([OFF], device)))
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int64
    token_logprobs, ids, values = top_logprobs(logits, tokens, 3)
    assert token_logprobs.shape == (0,) and ids.shape == values.shape == (0, 3)
    apply_penalties_(logits, *penalties(0, 10, device))


def penalties(n_rows, n_cols, device):
    """Tokens in the prompt, in the output, in both and in neither.

    Of five rows, the first has all penalties, then each has one, and the last has none.
    """
    prompt = torch.rand(n_rows, n_cols, device=device) < 0.3
    counts = torch.randint(-3, 4, (n_rows, n_cols), device=device).clamp(min=0).int()
    used = torch.cat([torch.ones(1, 3), torch.eye(3), torch.zeros(1, 3)])[5 - n_rows :].to(device)
    values = torch.rand(3, n_rows, device=device) + 0.1
    repetition, presence, frequency = (values * used.T).unbind()
    return prompt, counts, 1 + repetition, presence, -frequency


def test_penalties_reference_is_transformers_and_openai():
    logits, ids = torch.randn(3, 50), torch.randint(0, 50, (3, 20))
    prompt = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids[:, :9], True)
    counts = torch.zeros(3, 50, dtype=torch.int32)
    counts.scatter_add_(1, ids[:, 9:], torch.ones(3, 11, dtype=torch.int32))
    zero, one = torch.zeros(3), torch.ones(3)
    repeated = logits.clone()
    apply_penalties_reference(repeated, prompt, counts, one * 1.7, zero, zero)
    want = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    torch.testing.assert_close(repeated, want)
    counted = logits.clone()
    apply_penalties_reference(counted, prompt, counts, one, one * 0.5, one * 0.25)
    for row in range(3):
        for v in range(50):
            c = ids[row, 9:].tolist().count(v)
            assert counted[row, v] == pytest.approx(logits[row, v] - c * 0.25 - (c > 0) * 0.5)


@pytest.mark.parametrize("n_cols", [40, 1300])
def test_apply_penalties(n_cols, device):
    wide = torch.randn(5, n_cols + 3, device=device) * 5
    logits, args = wide[:, :n_cols], penalties(5, n_cols, device)
    before, want = wide.clone(), logits.clone()
    apply_penalties_reference(want, *args)
    apply_penalties_(logits, *args)
    check(logits, want, want)
    assert torch.equal(wide[:, n_cols:], before[:, n_cols:])
    assert torch.equal(logits[4], before[4, :n_cols])
    assert (logits[:4] != before[:4, :n_cols]).any(-1).all()


@pytest.mark.parametrize("reference", [False, True])
def test_penalties_of_rows_in_another_order(reference, device):
    """Each row of logits has the marks that `rows` names; -1 has none and stays."""
    logits, (prompt, counts, *values) = torch.randn(4, 70, device=device), penalties(5, 70, device)
    rows = torch.tensor([3, -1, 0, 3], device=device)
    values = [v[:4].clone() for v in values]
    before, want = logits.clone(), logits.clone()
    at = rows.clamp(min=0)
    apply_penalties_reference(want, prompt[at], counts[at], *values)
    want[1] = before[1]
    run = apply_penalties_reference if reference else apply_penalties_
    run(logits, prompt, counts, *values, rows=rows)
    torch.testing.assert_close(logits, want)
    assert not torch.equal(logits, before)


def test_penalties_leave_masked_tokens_masked(device):
    logits = torch.full((1, 70), -torch.inf, device=device)
    logits[0, 5] = 1.0
    ones = torch.ones(1, device=device)
    counts = torch.ones(1, 70, dtype=torch.int32, device=device)
    apply_penalties_(logits, counts > 0, counts, ones * 2, ones, ones)
    assert logits[0, 5] == -1.5
    assert (logits[0, torch.arange(70) != 5] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", [50, 517])
def test_top_logprobs(dtype, n_cols, device, small_tiles):
    logits = (torch.randn(3, n_cols) * torch.tensor([[0.1], [1], [9]])).to(device, dtype)
    logits[1, [3, 70 % n_cols, 44]] = 4.0  # equal: lowest id first
    tokens = torch.tensor([n_cols - 1, 44, 0], device=device)
    got = top_logprobs(logits, tokens, 7)
    want = top_logprobs_reference(logits.cpu(), tokens.cpu(), 7)
    assert torch.equal(got[1].cpu(), want[1])
    plain = torch.log_softmax(logits.cpu().float(), -1)
    check(got[2].cpu(), plain.gather(1, want[1]), want[2])
    check(got[0].cpu(), plain.gather(1, tokens.cpu()[:, None])[:, 0], want[0])


def test_top_logprobs_reference_is_torch():
    logits, tokens = torch.randn(4, 60), torch.tensor([0, 59, 3, 8])
    token_logprobs, ids, values = top_logprobs_reference(logits, tokens, 5)
    want = torch.log_softmax(logits, -1)
    torch.testing.assert_close(token_logprobs, want.gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close((values, ids), tuple(want.topk(5)))


def test_top_logprobs_of_one_span(device, small_tiles):
    """Twelve of the largest share a span."""
    logits = torch.randn(1, 700, device=device)
    logits[0, 65:77] += 20
    _, ids, _ = top_logprobs(logits, torch.zeros(1, dtype=torch.int64, device=device), 14)
    assert ids.cpu().tolist() == logits.cpu().sort(-1, descending=True).indices[:, :14].tolist()


def test_top_logprobs_of_equals_of_one_span_and_more(device, small_tiles):
    logits = torch.randn(1, 700)
    logits[0, 9::20] = 20.0
    token = torch.zeros(1, dtype=torch.int64, device=device)
    _, ids, _ = top_logprobs(logits.to(device), token, 30)
    assert ids.tolist() == [list(range(9, 9 + 600, 20))]


def test_top_logprobs_lists_no_impossible_token(device, small_tiles):
    logits = torch.full((3, 400), -torch.inf, device=device)
    logits[0, [300, 7]] = torch.tensor([1.0, 0.5], device=device)
    logits[1] = torch.randn(400, device=device)
    logits[1, 5:] = torch.nan
    tokens = torch.tensor([8, 400, -1], device=device)
    got = top_logprobs(logits, tokens, 6)
    for a, b in zip(got, top_logprobs_reference(logits.cpu(), tokens.cpu(), 6), strict=True):
        torch.testing.assert_close(a.cpu(), b)
    assert got[1][0].tolist() == [300, 7, -1, -1, -1, -1]
    assert (got[0] == -torch.inf).all()
    assert (got[2][2] == -torch.inf).all()
    assert top_logprobs(logits, tokens, 0)[1].shape == (3, 0)


def test_the_kernels_ran_and_not_their_references(device, monkeypatch):
    logits, args = torch.randn(2, 1500, device=device), penalties(2, 1500, device)
    for name, grid, run in (
        ("_spans_kernel", (2, 1), lambda: sample(logits, *requests([OFF] * 2, device))),
        ("_sample_kernel", (2,), lambda: sample(logits, *requests([OFF] * 2, device))),
        ("_apply_penalties_kernel", (2, 2), lambda: apply_penalties_(logits, *args)),
        ("_spans_kernel", (2, 1), lambda: top_logprobs(logits, args[1][:, 0].long(), 1)),
        ("_top_logprobs_kernel", (2,), lambda: top_logprobs(logits, args[1][:, 0].long(), 1)),
    ):
        grids = record_launches(monkeypatch, sampling, name)
        run()
        assert grids == [grid]


def test_registration(device):
    logits = torch.randn(2, 40, device=device)
    args = requests(SETTINGS[2:4], device)
    ops, tokens = torch.ops.tlk, torch.tensor([3, 39], device=device)
    torch.library.opcheck(ops.sample.default, (logits, *args))
    torch.library.opcheck(ops.top_logprobs.default, (logits, tokens, 2))
    marks = penalties(2, 40, device)
    torch.library.opcheck(ops.apply_penalties_.default, (logits, *marks))
    torch.library.opcheck(ops.apply_penalties_.default, (logits, *marks, tokens.flip(0) % 3))

    def step(logits, tokens):
        y = logits * 2
        apply_penalties_(y, *marks)
        return sample(y, *args), top_logprobs(y, tokens, 3)

    marks = penalties(2, 40, device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, tokens), step(logits, tokens))


def test_bad_arguments_are_refused(device):
    logits, args = torch.randn(2, 40, device=device), requests([OFF] * 2, device)
    with pytest.raises(TypeError, match="logits must be float32 or float16 or bfloat16, got int64"):
        sample(logits.long(), *args)
    with pytest.raises(ValueError, match=r"logits must have shape \(any, any\), got \(40,\)"):
        sample(logits[0], *args)
    with pytest.raises(ValueError, match="logits must have stride 1 in its last dimension"):
        sample(torch.randn(40, 2, device=device).T, *args)
    with pytest.raises(ValueError, match="logits must have at least one column"):
        sample(logits[:, :0], *args)
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "offsets")
    for i, name in enumerate(names):
        with pytest.raises(TypeError, match=f"{name} must be "):
            sample(logits, *args[:i], args[i].to(torch.float64), *args[i + 1 :])
        with pytest.raises(ValueError, match=rf"{name} must have shape \(2\), got \(1,\)"):
            sample(logits, *args[:i], args[i][:1], *args[i + 1 :])
        with pytest.raises(ValueError, match=f"{name} must have stride 1"):
            sample(logits, *args[:i], args[i].repeat_interleave(2)[::2], *args[i + 1 :])
    marks = penalties(2, 40, device)
    with pytest.raises(TypeError, match="logits must be float32, got bfloat16"):
        apply_penalties_(logits.bfloat16(), *marks)
    with pytest.raises(TypeError, match="prompt_mask must be bool, got float32"):
        apply_penalties_(logits, marks[0].float(), *marks[1:])
    with pytest.raises(ValueError, match=r"output_counts must have shape \(2, 40\), got \(2, 39\)"):
        apply_penalties_(logits, marks[0], marks[1][:, 1:], *marks[2:])
    with pytest.raises(TypeError, match="presence must be float32, got int32"):
        apply_penalties_(logits, *marks[:3], marks[3].int(), marks[4])
    with pytest.raises(TypeError, match="rows must be int64, got int32"):
        apply_penalties_(logits, *marks, rows=torch.zeros(2, device=device, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"rows must have shape \(2\), got \(3,\)"):
        apply_penalties_(logits, *marks, rows=torch.zeros(3, device=device, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"prompt_mask must have shape \(any, 40\)"):
        apply_penalties_(logits, marks[0][:, 1:], *marks[1:], rows=args[4])
    with pytest.raises(ValueError, match="n must be between 0 and 40, got 41"):
        top_logprobs(logits, args[4], 41)
    with pytest.raises(TypeError, match="tokens must be int64, got int32"):
        top_logprobs(logits, args[4].int(), 1)
