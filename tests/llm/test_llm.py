import gc
import random
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tlk
from tests.llm.fake import END, FakeEngine, Letters, frontend
from tests.llm.models import SMALL, make
from tests.models.zoo import tiny
from tlk import LLM, SamplingParams
from tlk.demo.generate import EMBEDDED
from tlk.errors import CapacityError, EngineError, UnsupportedError
from tlk.llm.inputs import Text

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = ["def fibonacci(", "class A", "import os\n", "x = [", "    return self."]


@pytest.fixture(scope="module")
def llm():
    with make(LLM) as llm:
        yield llm


def idle(llm):
    stats = llm.engine.stats()
    return not llm.engine.has_work and (stats["running"], stats["pages_used"]) == (0, 0)


def test_the_same_tokens_and_text_as_transformers(llm):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = expected[0, ids.shape[1] :].tolist()
        (completion,) = output.outputs
        assert (output.prompt, output.prompt_token_ids) == (prompt, ids[0].tolist())
        assert completion.token_ids == new
        assert completion.text == tokenizer.decode(new, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if new[-1] == 0 else "length")
        assert 0 < output.metrics.ttft <= output.metrics.latency
    assert idle(llm)


def test_results_keep_the_order_of_the_prompts(llm):
    lengths = [9, 1, 5, 3, 7]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in lengths]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == PROMPTS
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths


def test_ids_dicts_and_single_prompts(llm):
    ids = llm.get_tokenizer()("class A")["input_ids"]
    forms = ["class A", ids, {"prompt_token_ids": ids}, [ids], ["class A"], {"prompt": "class A"}]
    texts = {llm.generate(form, GREEDY, use_tqdm=False)[0].outputs[0].text for form in forms}
    assert len(texts) == 1
    assert llm.generate([], GREEDY) == []


def test_several_continuations(llm):
    params = SamplingParams(n=3, max_tokens=6, seed=5, temperature=1.0)
    first, again = (llm.generate("def f", params, use_tqdm=False)[0] for _ in range(2))
    assert [o.index for o in first.outputs] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in first.outputs}) > 1
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]


def test_logprobs_are_those_of_the_model(llm):
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("def fib", params, use_tqdm=False)
    (completion,) = output.outputs
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    ids = output.prompt_token_ids + completion.token_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = 0.0
    for i, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        row = expected[len(output.prompt_token_ids) - 1 + i]
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert entry[token].decoded_token == llm.get_tokenizer().decode([token])
        assert set(row.topk(2).indices.tolist()) <= set(entry)
        total += entry[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs[0] is None
    for i, entry in enumerate(output.prompt_logprobs[1:], 1):
        value = expected[i - 1, ids[i]].item()
        assert entry[ids[i]].logprob == pytest.approx(value, abs=1e-4)


def test_stop_strings_and_bad_words(llm):
    (plain,) = llm.generate("def fibonacci(", GREEDY, use_tqdm=False)
    text = plain.outputs[0].text
    stop = text[4:7]
    params = SamplingParams(temperature=0, max_tokens=12, stop=[stop])
    (cut,) = llm.generate("def fibonacci(", params, use_tqdm=False)
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    word = text.split()[0]
    params = SamplingParams(temperature=0, max_tokens=12, bad_words=[word])
    (without,) = llm.generate("def fibonacci(", params, use_tqdm=False)
    banned = llm.get_tokenizer().encode(word, add_special_tokens=False)
    ids = without.outputs[0].token_ids
    assert all(ids[i : i + len(banned)] != banned for i in range(len(ids)))
    assert idle(llm)


def test_prefixes_are_found_again(llm):
    prompt = "def test_prefixes(self):\n" * 8
    cached = [llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    assert cached[0] == 0 and cached[1] >= 16


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "at least one token"),
        ("", ValueError, "at least one character"),
        ([5, 99999], ValueError, "vocabulary"),
        ([5, -1], ValueError, "vocabulary"),
        ([5] * 300, ValueError, "300 tokens, but max_model_len is 256"),
        ({"text": "x"}, ValueError, "prompt_token_ids"),
        (5, TypeError, "got int"),
    ],
)
def test_one_bad_prompt_schedules_none(llm, bad, error, message):
    steps = llm.engine.stats()["steps"]
    with pytest.raises(error, match=r"prompts\[2\]: .*" + message):
        llm.generate(["a", "b", bad, "c"], GREEDY, use_tqdm=False)
    assert llm.engine.stats()["steps"] == steps and idle(llm)


def test_parameters_are_checked_before_anything_is_scheduled(llm):
    steps = llm.engine.stats()["steps"]
    beyond = SamplingParams(n=17)
    with pytest.raises(ValueError, match=r"prompts\[1\]: n must be at most max_num_seqs"):
        llm.generate(["a", "b"], [GREEDY, beyond], use_tqdm=False)
    with pytest.raises(ValueError, match="n must be at most"):
        llm.generate("a", beyond, use_tqdm=False)
    assert llm.engine.stats()["steps"] == steps and idle(llm)


def test_streamed_pieces_are_the_text(llm):
    params = SamplingParams(temperature=0, max_tokens=20)
    (whole,) = llm.generate("def fibonacci(", params, use_tqdm=False)
    pieces = list(llm.stream("def fibonacci(", params))
    assert "".join(pieces) == whole.outputs[0].text
    assert len(pieces) > 10 and all(pieces)
    assert idle(llm)


def test_a_stream_left_early_is_aborted(llm):
    stream = llm.stream("def fibonacci(", SamplingParams(temperature=0, max_tokens=200))
    next(stream)
    stream.close()
    assert idle(llm)


def test_a_stream_that_never_starts_leaves_nothing(llm):
    llm.stream("def fibonacci(")
    gc.collect()
    assert idle(llm)


def test_streams_may_interleave(llm):
    (whole,) = llm.generate("class A", GREEDY, use_tqdm=False)
    stream = llm.stream("class A", GREEDY)
    pieces = [next(stream)]
    llm.generate("import", SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    assert "".join([*pieces, *stream]) == whole.outputs[0].text


def test_what_cannot_be_streamed(llm):
    with pytest.raises(ValueError, match="n must be 1 to stream text, got 2"):
        llm.stream("a", SamplingParams(n=2))
    with pytest.raises(ValueError, match="prompt must be one prompt, got a list of 2"):
        llm.stream(["a", "b"])
    with pytest.raises(ValueError, match="detokenize must be True"):
        llm.stream("a", SamplingParams(detokenize=False))
    with pytest.raises(UnsupportedError, match=r"stream\(\) needs a tokenizer"):
        frontend(LLM, "ab", Text(None, "none")).stream([5])


def test_a_model_object_generates_on_its_own_weights():
    model = tlk.optimize(AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32))
    options = {k: v for k, v in SMALL.items() if k != "dtype"}
    with LLM(model, **options) as llm:
        (output,) = llm.generate("class A", GREEDY, use_tqdm=False)
    ids = torch.tensor([output.prompt_token_ids])
    same = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert same[0, ids.shape[1] :].tolist() == output.outputs[0].token_ids


def test_ids_in_and_out_without_a_tokenizer():
    with LLM(tiny("llama"), max_num_seqs=4, kv_cache_memory=1 << 20) as llm:
        (output,) = llm.generate([5, 6], use_tqdm=False)
        assert output.outputs[0].text == "" and output.outputs[0].token_ids
        with pytest.raises(UnsupportedError, match="pass tokenizer="):
            llm.generate("text")
        with pytest.raises(UnsupportedError, match=r"get_tokenizer.* needs a tokenizer"):
            llm.get_tokenizer()


class Chatty(Letters):
    chat_template = "x"

    def apply_chat_template(self, messages, **kwargs):
        assert kwargs["add_generation_prompt"] and kwargs["tokenize"]
        return {"input_ids": [ord(c) for m in messages for c in m["content"]]}


def test_chat_goes_through_the_template():
    llm = frontend(LLM, lambda prompt, index, place: prompt[place] if place < len(prompt) else END)
    llm._text = llm._requests._text = Text(Chatty())
    one = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(one, use_tqdm=False)
    assert output.outputs[0].text == "hi"
    two = [one, [{"role": "user", "content": "yo"}]]
    assert [o.outputs[0].text for o in llm.chat(two, use_tqdm=False)] == ["hi", "yo"]
    with pytest.raises(ValueError, match=r"prompts\[1\]: messages\[0\] must be a dict with a role"):
        llm.chat([one, [{"content": "x"}]])


def test_chat_needs_a_template(llm):
    with pytest.raises(UnsupportedError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_ctrl_c_aborts_and_leaves_the_engine_usable(llm):
    step, count = llm.engine.step, 0

    def interrupted():
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGINT)
        return step()

    llm.engine.step = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, SamplingParams(max_tokens=100), use_tqdm=False)
    finally:
        del llm.engine.step
    assert idle(llm)
    assert llm.generate("class A", GREEDY, use_tqdm=False)[0].finished


def test_an_exception_aborts_too():
    llm = frontend(LLM, "hello")
    step = llm.engine.step

    def fail():
        del llm.engine.step
        raise ZeroDivisionError

    llm.engine.step = fail
    with pytest.raises(ZeroDivisionError):
        llm.generate(["a", "b"], use_tqdm=False)
    assert llm.engine.step == step and llm.engine.calls["abort"] == 2
    assert not llm.engine.has_work and len(llm._requests) == 0


def test_a_prompt_that_the_engine_refuses_takes_the_others_back():
    llm = frontend(LLM, "hello")
    with pytest.raises(CapacityError, match=r"prompts\[1\]: 64 tokens are more than 64"):
        llm.generate([[5], [5] * 64, [5]], use_tqdm=False)
    assert not llm.engine.has_work and llm.engine.calls["abort"] == 1


def test_a_failed_request_leaves_the_others():
    llm = frontend(LLM, "hello")
    cause = RuntimeError("boom")
    llm.engine.fail["1"] = cause
    outputs = llm.generate(["a", "b", "c"], use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in outputs] == ["stop", "error", "stop"]
    assert [o.error for o in outputs] == [None, cause, None]


def test_a_failed_stream_raises_its_cause():
    llm = frontend(LLM, "hello")
    llm.engine.fail["0"] = RuntimeError("boom")
    with pytest.raises(EngineError, match="the request failed: boom") as raised:
        list(llm.stream("a"))
    assert raised.value.__cause__ is not None


def test_the_end_of_the_engine_raises():
    llm = frontend(LLM, "hello")

    def die():
        llm.engine.dead = RuntimeError("fault")
        del llm.engine.step
        return FakeEngine.step(llm.engine)

    llm.engine.step = die
    with pytest.raises(EngineError, match="a CUDA fault"):
        llm.generate(["a", "b"], use_tqdm=False)
    with pytest.raises(EngineError):
        llm.generate("a", use_tqdm=False)


def test_after_close_nothing_runs():
    with make(LLM) as llm:
        llm.generate("a", GREEDY, use_tqdm=False)
    with pytest.raises(EngineError):
        llm.generate("a", GREEDY, use_tqdm=False)
    llm.close()


def test_progress_counts_prompts(llm, capsys):
    llm.generate(PROMPTS, GREEDY)
    assert "5/5" in capsys.readouterr().err
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_none_means_the_models_own_parameters():
    llm = frontend(LLM, "hello world")
    llm.default_params = SamplingParams(max_tokens=3)
    assert llm.generate("a", use_tqdm=False)[0].outputs[0].text == "hel"


def test_random_mixtures_give_what_each_gives_alone():
    rng = random.Random(3)
    with make(LLM, deterministic=True) as llm:
        prompts = [[rng.randrange(1, 1900) for _ in range(rng.randrange(1, 60))] for _ in range(12)]
        params = [
            SamplingParams(
                max_tokens=rng.randrange(1, 16),
                temperature=rng.choice([0.0, 0.8]),
                seed=i,
                stop=rng.choice([(), ("e",), ("\n", "self")]),
            )
            for i in range(12)
        ]
        together = llm.generate(prompts, params, use_tqdm=False)
        alone = [
            llm.generate(p, s, use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)
        ]
        for a, b in zip(together, alone, strict=True):
            assert a.outputs == b.outputs
        assert idle(llm)
