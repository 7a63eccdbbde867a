import pytest

from tests.llm.fake import END, FakeEngine, Letters, writes
from tlk.errors import EngineError
from tlk.llm.inputs import Text
from tlk.llm.outputs import Logprob
from tlk.llm.requests import Requests
from tlk.runtime.params import SamplingParams

DEFAULT = SamplingParams()
TEXT = Text(Letters())


def start(script, params=DEFAULT, live=True, id="a"):
    engine = FakeEngine(writes(script) if isinstance(script, str) else script)
    requests = Requests(engine, TEXT)
    output = requests.add(TEXT.prepare("p", params, DEFAULT), id, live=live)
    return engine, requests, output


def run(engine, requests):
    while engine.has_work:
        yield requests.step()


def test_text_grows_to_the_end():
    engine, requests, output = start("hello")
    seen = [output.outputs[0].text for _ in run(engine, requests)]
    assert seen == ["", "h", "he", "hel", "hell", "hello", "hello", "hello"]
    (completion,) = output.outputs
    assert completion.token_ids == [*map(ord, "hello"), END]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert output.finished and "a" not in requests and len(requests) == 0
    assert output.metrics.finished_time >= output.metrics.first_token_time


def test_without_onlookers_text_is_made_once():
    engine, requests, output = start("hello", live=False)
    seen = [output.outputs[0].text for _ in run(engine, requests)]
    assert seen == [""] * 6 + ["hello"] * 2
    assert output.outputs[0].token_ids == [*map(ord, "hello"), END]


@pytest.mark.parametrize("live", [True, False])
def test_a_stop_string_cuts_the_text_and_drops_the_token_in_flight(live):
    engine, requests, output = start("one. two. three", SamplingParams(stop=[". t", "x"]), live)
    for _ in run(engine, requests):
        pass
    (completion,) = output.outputs
    assert completion.text == "one"
    assert completion.token_ids == [*map(ord, "one. t")]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", ". t")
    assert engine.calls["finish"] == 1 and not engine.requests


def test_a_stop_string_in_the_last_token_does_not_finish_twice():
    engine, requests, output = start("abc", SamplingParams(stop=["c"], max_tokens=3))
    for _ in run(engine, requests):
        pass
    (completion,) = output.outputs
    assert (completion.text, completion.stop_reason) == ("ab", "c")
    assert completion.finish_reason == "stop" and engine.calls["finish"] == 0


def test_a_stop_string_counts_from_min_tokens_on():
    engine, requests, output = start("a.b.c", SamplingParams(stop=["."], min_tokens=3))
    for _ in run(engine, requests):
        pass
    assert output.outputs[0].text == "a.b"


def test_a_token_that_ends_the_text_is_none_of_it():
    params = SamplingParams(stop_token_ids=[ord("l")], skip_special_tokens=False)
    for live in (True, False):
        engine, requests, output = start("hello", params, live)
        for _ in run(engine, requests):
            pass
        (completion,) = output.outputs
        assert (completion.text, completion.stop_reason) == ("he", ord("l"))
        assert completion.token_ids[-1] == ord("l")


def test_the_length_keeps_its_last_token():
    engine, requests, output = start("hello", SamplingParams(max_tokens=3), live=False)
    for _ in run(engine, requests):
        pass
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("hel", "length")


def test_several_continuations_stay_apart():
    def script(prompt, index, place):
        text = "xyz"[index] * (index + 1)
        return ord(text[place]) if place < len(text) else END

    engine, requests, output = start(script, SamplingParams(n=3))
    finished = [[o.finished for o in changed] for changed in run(engine, requests)]
    assert [o.text for o in output.outputs] == ["x", "yy", "zzz"]
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert sum(f == [True] for f in finished) == 1


def test_a_stop_string_ends_one_continuation_and_not_its_sibling():
    def script(prompt, index, place):
        return ord("ab.cdefg"[place] if index == 0 else "x")

    engine, requests, output = start(script, SamplingParams(n=2, stop=["."], max_tokens=7))
    for _ in run(engine, requests):
        pass
    stopped, other = output.outputs
    assert (stopped.text, stopped.token_ids) == ("ab", [*map(ord, "ab.")])
    assert (other.text, other.finish_reason) == ("x" * 7, "length")


def test_logprobs_come_with_their_text():
    engine, requests, output = start("ab", SamplingParams(logprobs=1))
    engine.requests["a"].prompt_logprobs = [None, {5: -2.0}]
    for _ in run(engine, requests):
        pass
    (completion,) = output.outputs
    assert completion.logprobs[0] == {97: Logprob(-0.5, "a"), 98: Logprob(-1.5, "b")}
    assert len(completion.logprobs) == len(completion.token_ids) == 3
    assert completion.cumulative_logprob == -1.5
    assert output.prompt_logprobs == [None, {5: Logprob(-2.0, "\x05")}]


def test_no_logprobs_unless_asked_for():
    engine, requests, output = start("ab")
    for _ in run(engine, requests):
        pass
    assert output.outputs[0].logprobs is None and output.outputs[0].cumulative_logprob is None


def test_without_detokenization_there_are_ids_only():
    engine, requests, output = start("ab", SamplingParams(detokenize=False, logprobs=0))
    for _ in run(engine, requests):
        pass
    assert output.outputs[0].text == "" and output.outputs[0].token_ids == [97, 98, END]


def test_abort_keeps_what_was_drawn_and_ignores_the_rest():
    engine, requests, output = start("hello", live=False)
    for _ in range(3):
        requests.step()
    assert requests.abort(["a", "unknown"]) == [output]
    (completion,) = output.outputs
    assert (completion.text, completion.finish_reason) == ("he", "abort")
    requests.settle()
    assert not engine.has_work and completion.token_ids == [*map(ord, "he")]


def test_a_reused_id_does_not_get_its_predecessors_tokens():
    _, requests, _ = start("hello")
    for _ in range(2):
        requests.step()
    requests.abort(["a"])
    second = requests.add(TEXT.prepare("q", DEFAULT, DEFAULT), "a", live=True)
    requests.step()
    assert second.outputs[0].token_ids == [] and not second.finished


def test_an_id_in_flight_is_refused():
    _, requests, _ = start("hello")
    with pytest.raises(ValueError, match=r"request_id must not be .* in flight, got 'a'"):
        requests.add(TEXT.prepare("q", DEFAULT, DEFAULT), "a", live=True)


def test_a_failed_request_says_why_and_keeps_what_it_had():
    engine, requests, output = start("hello")
    cause = RuntimeError("boom")
    for _ in range(3):
        requests.step()
    engine.fail["a"] = cause
    for _ in run(engine, requests):
        pass
    assert output.error is cause and output.outputs[0].finish_reason == "error"
    assert output.outputs[0].text in ("he", "hel") and output.finished


def test_the_end_of_the_engine_drops_all_requests():
    engine, requests, _ = start("hello")
    engine.dead = RuntimeError("fault")
    with pytest.raises(EngineError):
        requests.step()
    assert len(requests) == 0 and requests.abort(["a"]) == []
