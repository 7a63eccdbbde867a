import json

import numpy as np
import pytest
import torch

from tlk.bench import peers, serving
from tlk.bench.serving import ServingOptions, drive, measure, random_prompts, show, write
from tlk.bench.sources import load_source
from tlk.errors import EngineError
from tlk.runtime.engine import Engine
from tlk.runtime.options import EngineOptions
from tlk.runtime.params import SamplingParams

TINY = {
    "random_weights": "tiny",
    "device": "cpu",
    "input_len": 12,
    "output_len": 4,
    "num_prompts": 5,
    "max_model_len": 64,
    "max_num_seqs": 3,
    "kv_cache_memory": 1 << 20,
}


def options(**changes):
    return ServingOptions(**{**TINY, **changes})


def test_throughput_has_every_request_and_token():
    record = measure("throughput", options(repeats=2, warmup=1))
    figures = record["figures"]["tlk"]
    assert figures["completed"] == 5 and len(figures["durations"]) == 2
    assert figures["output_throughput"] == pytest.approx(20 / figures["duration"])
    assert figures["total_token_throughput"] == pytest.approx(80 / figures["duration"])
    assert {f"{s}_{t}_ms" for s in ("mean", "median", "p99") for t in ("ttft", "tpot", "itl")} <= {
        *figures
    }
    assert record["profile"] is None and record["shares"] == {}


def test_latency_relates_a_batch_to_the_limits():
    record = measure("latency", options(batch_size=2, repeats=3, warmup=0, profile=True))
    figures, limits = record["figures"]["tlk"], record["ceilings"]
    assert len(figures["latencies"]) == 3
    assert figures["output_throughput"] == pytest.approx(8 / figures["p50_latency"])
    read = record["model"]["decode_bytes"] / figures["median_tpot_ms"] * 1000
    assert record["shares"]["decode_of_copy"] == pytest.approx(read / limits["copy_bytes_per_s"])
    done = 2 * 24 * record["model"]["linear_parameters"] / figures["median_ttft_ms"] * 1000
    assert record["shares"]["prefill_of_matmul"] == pytest.approx(done / limits["matmul_flops"])
    assert record["profile"]["kernel_us"]["attention"] > 0
    assert record["engine"]["running"] == 0 and record["engine"]["pages_used"] == 0


def test_the_record_is_json_and_says_how_it_came_about(tmp_path):
    record = measure("latency", options(repeats=1, warmup=0))
    write(record, tmp_path / "new" / "one.json")
    assert json.loads((tmp_path / "new" / "one.json").read_text()) == record
    for _ in range(2):
        write(record, tmp_path / "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record, record]
    assert record["command"].startswith("tlk bench latency --random-weights tiny --input-len 12")
    assert record["options"]["seed"] == 0 and record["versions"]["torch"] == torch.__version__
    assert {"load"} <= {*record["start_s"]} and record["memory"]["kv_cache"] > 0
    text = show(record)
    assert "median_ttft_ms" in text and "copy " in text and "start: load" in text


def test_peers_run_on_the_same_weights(monkeypatch):
    seen = {}

    def batch(model, prompts, new):
        seen["weight"] = model.lm_head.weight.clone()
        seen["prompts"] = prompts
        return {"median": 2.0, "min": 2.0, "max": 2.0}

    monkeypatch.setattr(peers, "generate_batch", batch)
    record = measure("throughput", options(compare="transformers", compare_prompts=4))
    figures = record["figures"]
    assert list(figures) == ["transformers generate", "transformers generate_batch", "tlk"]
    assert figures["transformers generate_batch"]["output_throughput"] == 8.0
    assert figures["transformers generate"]["prompts"] == len(seen["prompts"]) == 4
    assert figures["transformers generate"]["output_throughput"] > 0
    source = load_source(None, "tiny", "auto", torch.device("cpu"), 0, peer=True)
    assert torch.equal(source.decoder.lm_head.weight, seen["weight"])


def test_a_peer_that_needs_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("it runs there")
    record = measure("latency", options(compare="transformers", repeats=1, warmup=0))
    failed = record["figures"]["transformers generate, static cache + compile"]["failed"]
    assert "on a GPU only" in failed and "failed" in show(record)
    assert record["figures"]["transformers generate"]["seconds"]["median"] > 0


def test_prompts_are_new_in_every_run_and_the_same_for_a_seed():
    first, second = (random_prompts(np.random.default_rng(s), 3, 5, 99) for s in (1, 2))
    assert first == random_prompts(np.random.default_rng(1), 3, 5, 99) != second
    assert all(len(p) == 5 and max(p) < 99 for p in first)


def test_a_failed_request_fails_the_benchmark(monkeypatch):
    source = load_source(None, "tiny", "auto", torch.device("cpu"), 0, peer=False)
    engine = Engine(source.decoder, EngineOptions(max_model_len=64, kv_cache_memory=1 << 20))
    monkeypatch.setattr(engine._runner, "launch", lambda step: 1 / 0)
    with pytest.raises(EngineError, match="a request failed: division by zero") as raised:
        drive(engine, [[1, 2]], SamplingParams(max_tokens=2))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_output_that_does_not_fit_is_no_measurement():
    with pytest.raises(ValueError, match=r"output_len must fit .* \(64\): a request got 52 of 60"):
        measure("latency", options(output_len=60, warmup=0))
    with pytest.raises(ValueError, match="leave room to profile behind 60 tokens"):
        measure("latency", options(input_len=58, warmup=0, repeats=1, profile=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "m"}, "either a model or random_weights"),
        ({"random_weights": None}, "either a model or random_weights"),
        ({"input_len": 0}, "input_len must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"compare": "vllm"}, "compare must be transformers, got vllm"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(ValueError, match=message):
        options(**fields)


def test_options_reach_the_engine_and_the_command_line():
    o = options(deterministic=True, seed=4, gpu_memory_utilization=0.5)
    engine = o.engine()
    assert (engine.deterministic, engine.seed, engine.max_num_seqs) == (True, 4, 3)
    assert (engine.gpu_memory_utilization, engine.kv_cache_memory) == (0.5, 1 << 20)
    command = o.command("throughput")
    assert "--deterministic" in command and "--seed 4" in command and "--profile" not in command
    assert serving.ServingOptions(model="a b").command("latency") == "tlk bench latency 'a b'"
