from tlk.llm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def output(**fields):
    completion = CompletionOutput(0, "a", [1], logprobs=[{1: Logprob(-1.0, "a")}])
    return RequestOutput("7", "p", [5], [completion], RequestMetrics(1.0), **fields)


def test_a_snapshot_stays_as_it_was():
    live = output()
    before = live.snapshot()
    live.outputs[0].text += "b"
    live.outputs[0].token_ids.append(2)
    live.outputs[0].logprobs.append({2: Logprob(-2.0, "b")})
    live.outputs[0].finish_reason = "length"
    live.metrics.first_token_time = 3.0
    kept = before.outputs[0]
    assert (kept.text, kept.token_ids, len(kept.logprobs)) == ("a", [1], 1)
    assert not before.finished and live.finished
    assert before.metrics.ttft is None and live.metrics.ttft == 2.0


def test_finished_is_all_of_them():
    both = output()
    both.outputs.append(CompletionOutput(1, finish_reason="stop"))
    assert not both.finished
    both.outputs[0].finish_reason = "length"
    assert both.finished


def test_times_count_from_arrival():
    metrics = RequestMetrics(1.0, first_token_time=1.5, last_token_time=3.0, finished_time=3.0)
    assert (metrics.ttft, metrics.latency) == (0.5, 2.0)
    assert RequestMetrics(1.0).latency is None
