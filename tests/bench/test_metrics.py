import pytest

from tlk.bench.metrics import Run, Served, latency, percentile, throughput, times

FAST = Served(prompt=10, arrival=1.0, tokens=[1.5, 1.6, 1.8])
SLOW = Served(prompt=20, arrival=1.0, tokens=[3.0])
RUN = Run(2.0, [FAST, SLOW])


def test_times_are_those_of_vllm_in_ms():
    figures = times([RUN])
    assert figures["mean_ttft_ms"] == pytest.approx(1250)
    assert figures["median_ttft_ms"] == pytest.approx(1250)
    assert figures["p99_ttft_ms"] == pytest.approx(1985)
    assert figures["mean_tpot_ms"] == pytest.approx(150)  # one token has none
    assert figures["mean_itl_ms"] == pytest.approx(150)
    assert figures["p99_itl_ms"] == pytest.approx(199)


def test_one_token_each_has_no_time_between():
    assert set(times([Run(2.0, [SLOW])])) == {"mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms"}


def test_throughput_is_that_of_the_median_run():
    figures = throughput([RUN, Run(4.0, [FAST, SLOW]), Run(1.0, [FAST, SLOW])])
    assert figures["durations"] == [2.0, 4.0, 1.0] and figures["duration"] == 2.0
    assert figures["completed"] == 2
    assert figures["request_throughput"] == 1.0
    assert figures["output_throughput"] == 2.0
    assert figures["total_token_throughput"] == 17.0


def test_latency_is_of_whole_batches():
    figures = latency([RUN, Run(4.0, [FAST, SLOW]), Run(1.0, [FAST, SLOW])])
    assert figures["avg_latency"] == pytest.approx(7 / 3)
    assert (figures["p50_latency"], figures["output_throughput"]) == (2.0, 2.0)
    assert figures["p90_latency"] == pytest.approx(3.6)


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2.5), (99, 3.97), (100, 4)])
def test_percentiles_lie_between_neighbours(percent, value):
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(value)
    assert percentile([7], percent) == 7
