"""The engine on the embedded model: what a request gets does not depend on what else runs."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.runtime.demo import DEVICE, EOS, VOCAB, add, drain, engine, outputs, pages, random_jobs
from tlk.demo.generate import EMBEDDED
from tlk.errors import CapacityError, EngineError
from tlk.runtime.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPT = [400, 12, 77, 5, 1000, 33, 8, 64, 3, 250, 17]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def run(jobs, **options):
    """The outputs of `jobs`, all there from the start, and the engine's statistics."""
    e = engine(deterministic=True, **options)
    requests = [add(e, job) for job in jobs]
    drain(e)
    return [outputs(r) for r in requests], e.stats()


@pytest.fixture(scope="module")
def jobs():
    return random_jobs(200)


@pytest.fixture(scope="module")
def alone(jobs):
    """What each job gives when nothing else runs."""
    e = engine(deterministic=True, enable_prefix_caching=False)
    results = []
    for job in jobs:
        request = add(e, job)
        drain(e)
        results.append(outputs(request))
    return results


def test_greedy_tokens_are_those_of_transformers():
    original = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).to(DEVICE).eval()
    e = engine()
    requests = [e.add(PROMPT[:n], GREEDY) for n in (1, 4, 11)]
    drain(e)
    for request in requests:
        ids = torch.tensor([request.prompt], device=DEVICE)
        expected = original.generate(
            ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert request.prompt + request.sequences[0].output == expected[0].tolist()


@pytest.mark.parametrize("caching", [True, False])
def test_batched_is_alone(jobs, alone, caching):
    results, stats = run(jobs, enable_prefix_caching=caching)
    assert results == alone
    assert (stats["cached_tokens"] > 500) == caching
    assert stats["pages_used"] == stats["running"] == stats["waiting"] == 0


def test_preempted_hundreds_of_times_is_alone():
    """A hundred short prompts with long outputs, in a pool that holds hardly more than one of them."""
    jobs = [(prompt[:3], *rest) for prompt, *rest in random_jobs(100, seed=1, most_tokens=60)]
    e = engine(deterministic=True)
    alone = []
    for job in jobs:
        request = add(e, job)
        drain(e)
        alone.append(outputs(request))
    results, stats = run(
        jobs, page_size=1, kv_cache_memory=pages(70, page_size=1), max_model_len=65
    )
    assert stats["preemptions"] > 200
    assert results == alone


@pytest.mark.parametrize("budget", [1, 3, 40])
def test_chunked_prefill_is_alone(jobs, alone, budget):
    some = slice(0, 40) if budget < 40 else slice(None)
    results, _ = run(jobs[some], max_num_batched_tokens=budget)
    assert results == alone[some]


def test_random_arrivals_and_aborts(jobs, alone):
    rng = random.Random(4)
    e = engine(deterministic=True, kv_cache_memory=pages(24))
    requests, waiting = {}, list(range(len(jobs)))
    aborted = set()
    while waiting or e.has_work:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                i = waiting.pop(0)
                requests[i] = add(e, jobs[i])
        open_ones = [i for i, request in requests.items() if not request.finished]
        if open_ones and rng.random() < 0.3:
            i = rng.choice(open_ones)
            assert e.abort(requests[i].id)
            aborted.add(i)
        e.step()
    assert 15 < len(aborted) < 150
    for i, request in requests.items():
        if i not in aborted:
            assert outputs(request) == alone[i]
        else:
            assert all(s.finish_reason is not None for s in request.sequences)
            pairs = zip(outputs(request), alone[i], strict=True)
            assert all(got == whole[: len(got)] for got, whole in pairs)
    assert e.stats()["pages_used"] == 0


def test_logits_are_bitwise_those_of_batch_one():
    """Log-probabilities, which show the last bit of the logits, in float32 and alone or among others."""
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, ignore_eos=True)
    seen = []
    for others in (0, 7):
        e = engine(deterministic=True)
        request = e.add(PROMPT, params)
        for i in range(others):
            e.add([9 + i] * (i + 1), GREEDY)
        updates = [u for u in drain(e) if u.sequence.request is request]
        seen.append([u.logprobs for u in updates])
    assert len(seen[0]) == 6 and seen[0] == seen[1]


# ---- how sequences end


def tokens_of(params, **options):
    e = engine(**options)
    request = e.add(PROMPT, params)
    drain(e)
    return request.sequences[0]


def test_end_of_text_ends_a_sequence_and_is_kept():
    free = tokens_of(GREEDY)
    assert free.finish_reason == "length" and len(free.output) == 20
    stop = free.output[5]
    first = free.output.index(stop)
    ended = tokens_of(SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[stop]))
    assert ended.output == free.output[: first + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)


def test_eos_is_no_stop_reason_and_can_be_ignored():
    bias = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={EOS[0]: 100.0})
    ended = tokens_of(bias)
    assert ended.output == [EOS[0]] and ended.finish_reason == "stop" and ended.stop_reason is None
    ignored = tokens_of(
        SamplingParams(temperature=0.0, max_tokens=4, logit_bias={EOS[0]: 100.0}, ignore_eos=True)
    )
    assert ignored.output == [EOS[0]] * 4 and ignored.finish_reason == "length"


def test_min_tokens_puts_the_end_off():
    for least in (1, 3):
        params = SamplingParams(
            temperature=0.0, max_tokens=9, min_tokens=least, logit_bias={EOS[0]: 100.0}
        )
        ended = tokens_of(params)
        assert len(ended.output) == least + 1 and ended.output[-1] == EOS[0]
        assert EOS[0] not in ended.output[:-1]


def test_the_context_ends_a_sequence():
    ended = tokens_of(
        SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True), max_model_len=24
    )
    assert len(ended.output) == 24 - len(PROMPT) and ended.finish_reason == "length"


def test_finish_ends_a_sequence_and_frees_its_pages():
    e = engine()
    request = e.add(PROMPT, GREEDY)
    while len(request.sequences[0].output) < 3:
        e.step()
    e.finish(request.sequences[0], "a stop string")
    assert drain(e) == []
    assert request.sequences[0].stop_reason == "a stop string"
    assert len(request.sequences[0].output) == 3 and e.stats()["pages_used"] == 0


# ---- what the settings do


def test_settings_reach_the_sampler():
    free = tokens_of(GREEDY).output
    banned = tokens_of(
        SamplingParams(
            temperature=0.0, max_tokens=20, ignore_eos=True, logit_bias={free[0]: -100.0}
        )
    )
    assert free[0] not in banned.output
    allowed = tokens_of(SamplingParams(max_tokens=20, ignore_eos=True, allowed_token_ids=[3, 5, 8]))
    assert set(allowed.output) <= {3, 5, 8} and len(set(allowed.output)) > 1
    penalized = tokens_of(
        SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, frequency_penalty=100.0)
    )
    assert len(set(penalized.output)) == 40


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bad_words_do_not_appear(length):
    free = tokens_of(GREEDY).output
    word = free[4 : 4 + length]
    e = engine()
    request = e.add(PROMPT, GREEDY, bad_words=[word])
    drain(e)
    got = request.sequences[0].output
    assert got[: 4 + length - 1] == free[: 4 + length - 1]
    assert all(got[i : i + length] != word for i in range(len(got)))


def test_seeds():
    def drawn(seed, engine_seed=0, n=1):
        params = SamplingParams(max_tokens=8, seed=seed, n=n, ignore_eos=True)
        e = engine(seed=engine_seed)
        requests = [e.add(PROMPT, params) for _ in range(2)]
        drain(e)
        return [outputs(r) for r in requests]

    first, second = drawn(5)
    assert first == second == drawn(5, engine_seed=1)[0] != drawn(6)[0]
    first, second = drawn(None)
    assert first != second and [first, second] == drawn(None) != drawn(None, engine_seed=1)
    a, b, c = drawn(5, n=3)[0]
    assert a == drawn(5)[0][0] and len({tuple(a), tuple(b), tuple(c)}) == 3


def test_logprobs_are_those_of_the_logits():
    e = engine()
    params = SamplingParams(
        temperature=1.5, top_k=3, max_tokens=5, logprobs=2, prompt_logprobs=1, ignore_eos=True,
        repetition_penalty=1.4,
    )  # fmt: skip
    request = e.add(PROMPT * 3, params)
    updates = drain(e)
    original = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).to(DEVICE).eval()
    whole = request.prompt + request.sequences[0].output
    with torch.no_grad():
        logprobs = original(torch.tensor([whole], device=DEVICE)).logits[0].log_softmax(-1).cpu()
    n = len(request.prompt)
    for i, update in enumerate(updates):
        expected = logprobs[n - 1 + i]
        (table,) = update.logprobs
        top = expected.topk(2).indices.tolist()
        assert set(table) == {*top, update.tokens[0]}
        assert all(abs(v - expected[token].item()) < 1e-4 for token, v in table.items())
    assert request.prompt_logprobs is not None and len(request.prompt_logprobs) == n
    assert request.prompt_logprobs[0] is None
    for i, entry in enumerate(request.prompt_logprobs[1:]):
        assert entry is not None and request.prompt[i + 1] in entry
        assert {logprobs[i].argmax().item(), request.prompt[i + 1]} == set(entry)
        assert all(abs(v - logprobs[i][token].item()) < 1e-4 for token, v in entry.items())


# ---- bad input, failures, limits


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], GREEDY, "prompt must hold at least one token"),
        ([VOCAB], GREEDY, f"prompt must hold ids below the vocabulary's {VOCAB}, got {VOCAB}"),
        ([-1], GREEDY, "prompt"),
        ([1] * 128, GREEDY, "prompt has 128 tokens, but max_model_len is 128"),
        ([1], SamplingParams(n=17), "n must be at most"),
        ([1], SamplingParams(stop_token_ids=[VOCAB]), "stop_token_ids"),
        ([1], SamplingParams(allowed_token_ids=[VOCAB]), "allowed_token_ids"),
        ([1], SamplingParams(logit_bias={VOCAB: 1.0}), "logit_bias"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_before_anything_is_queued(prompt, params, words):
    e = engine()
    with pytest.raises(ValueError, match=words):
        e.add(prompt, params)
    assert not e.has_work


def test_ids_are_unique_while_a_request_runs():
    e = engine()
    e.add(PROMPT, GREEDY, id="a")
    with pytest.raises(ValueError, match="'a'"):
        e.add(PROMPT, GREEDY, id="a")
    drain(e)
    e.add(PROMPT, GREEDY, id="a")
    assert e.abort("a") and not e.abort("a")
    (update,) = drain(e)
    assert update.sequence.finish_reason == "abort" and update.tokens == []


def test_the_context_is_fitted_to_the_cache():
    e = engine(kv_cache_memory=pages(3) + 5)
    assert e.max_model_len == 48
    assert "max_model_len is 48 and not 128" in e.notices[0]
    with pytest.raises(ValueError, match="prompt has 48 tokens"):
        e.add([1] * 48, GREEDY)


def test_a_cache_without_a_page_is_an_error():
    with pytest.raises(CapacityError, match=f"one page of 16 tokens takes {pages(1):,}"):
        engine(kv_cache_memory=pages(1) - 1)


def test_a_failing_step_fails_its_requests_and_no_others(monkeypatch):
    e = engine()
    first = e.add(PROMPT, GREEDY)
    e.step()
    launch, cause = e._runner.launch, RuntimeError("injected")

    def fails(step):
        raise cause

    monkeypatch.setattr(e._runner, "launch", fails)
    e.step()
    monkeypatch.setattr(e._runner, "launch", launch)
    other = e.add(PROMPT, GREEDY)
    updates = drain(e)
    assert first.error is cause and first.sequences[0].finish_reason == "error"
    assert [u.tokens for u in updates if u.sequence.request is first] in ([[]], [])
    assert other.error is None and len(other.sequences[0].output) == 20
    assert e.stats()["pages_used"] == 0


ILLEGAL = "an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("launch", torch.AcceleratorError(f"CUDA error: {ILLEGAL}")),
        ("launch", RuntimeError(f"Triton Error [CUDA]: {ILLEGAL}")),
        ("read", torch.AcceleratorError(f"CUDA error: {ILLEGAL}")),
    ],
)
def test_a_fault_of_the_gpu_ends_the_engine(monkeypatch, where, fault):
    e = engine()
    e.add(PROMPT, GREEDY)
    e.step()

    def faults(*args):
        raise fault

    place = e._runner if where == "launch" else type(e._flight)
    monkeypatch.setattr(place, where, faults)
    with pytest.raises(EngineError, match="illegal memory access") as raised:
        e.step()
    assert raised.value.__cause__ is fault
    for call in (e.step, lambda: e.add(PROMPT, GREEDY)):
        with pytest.raises(EngineError, match="has ended"):
            call()


def test_a_launch_that_finds_no_memory_fails_its_requests_only(monkeypatch):
    e = engine()
    first = e.add(PROMPT, GREEDY)
    launch, full = e._runner.launch, torch.OutOfMemoryError("CUDA out of memory")

    def fails(step):
        raise full

    monkeypatch.setattr(e._runner, "launch", fails)
    e.step()
    monkeypatch.setattr(e._runner, "launch", launch)
    second = e.add(PROMPT, GREEDY)
    drain(e)
    assert first.error is full and len(second.sequences[0].output) == 20


def test_close():
    e = engine()
    e.add(PROMPT, GREEDY)
    e.step()
    e.close()
    with pytest.raises(EngineError, match="closed"):
        e.step()


def test_the_next_step_is_launched_before_the_last_is_read(monkeypatch):
    e = engine()
    e.add(PROMPT, GREEDY)
    order = []
    launch = e._runner.launch

    def recorded(step):
        flight = launch(step)
        number = len([o for o in order if o[0] == "launch"])
        order.append(("launch", number))
        read = flight.read
        monkeypatch.setattr(type(flight), "read", type(flight).read)

        class Read:
            drawn = flight.drawn

            def read(self):
                order.append(("read", number))
                return read()

        return Read()

    monkeypatch.setattr(e._runner, "launch", recorded)
    drain(e)
    assert order[:4] == [("launch", 0), ("launch", 1), ("read", 0), ("launch", 2)]


# ---- on a GPU


@needs_gpu
def test_decode_steps_replay_graphs():
    e = engine()
    for n in range(1, 6):
        e.add(PROMPT[:n], GREEDY)
    drain(e)
    stats = e.stats()
    assert stats["graph_replays"] == stats["steps"] == 20 and stats["eager_steps"] == 0


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_does_not_wait_for_the_gpu():
    e = engine()
    params = SamplingParams(
        max_tokens=20, ignore_eos=True, repetition_penalty=1.2, logit_bias={4: 1.0}, logprobs=1,
        prompt_logprobs=1, allowed_token_ids=range(500), min_tokens=4,
    )  # fmt: skip
    e.add(PROMPT, params)
    e.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        e.add(PROMPT, GREEDY)
        e.add(PROMPT, params)
        drain(e)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_graph_that_does_not_fit_is_dropped_and_named(monkeypatch):
    from tlk.runtime.graphs import Graphs

    capture = Graphs._capture

    def too_large(self, shape):
        if shape.sequences == 16:
            raise torch.OutOfMemoryError("no memory")
        return capture(self, shape)

    monkeypatch.setattr(Graphs, "_capture", too_large)
    e = engine()
    assert any("no CUDA graph for decode steps of 16 tokens" in n for n in e.notices)
    requests = [e.add(PROMPT, GREEDY) for _ in range(16)]
    drain(e)
    assert all(len(r.sequences[0].output) == 20 for r in requests)
    assert e.stats()["eager_steps"] > 0
