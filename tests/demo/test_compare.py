import json
from dataclasses import replace

import pytest
import torch

from tlk.demo.compare import compare


@pytest.fixture(scope="module")
def result(tiny):
    return compare(tiny, "def f(x):\n", max_new_tokens=9)


def test_tlk_generates_what_transformers_does(result):
    assert result.matched and len(result.tlk.tokens) == 9
    assert "9 new, the same from both" in str(result)
    assert "    | def f(x):\n" in str(result)


def test_tlk_ran_and_is_reported(result):
    assert result.report.family == "llama" and not result.report.reasons
    assert sum(result.report.ops["decode"].values()) > 10
    assert str(result.report) in str(result)


def test_speed_and_memory_are_measured(result):
    for run in (result.transformers, result.tlk):
        assert run.tokens_per_second > 0 and run.peak_bytes > run.kv_cache_bytes > 0
    # 3 layers, 2 heads, keys and values of 64 floats for each token; tlk rounds up to whole pages
    per_token = 3 * 2 * 2 * 64 * 4
    assert result.transformers.kv_cache_bytes % per_token == 0
    assert result.tlk.kv_cache_bytes % (16 * per_token) == 0
    assert result.parameter_bytes == 4 * (512 * 256 + 3 * (3 * 256 * 384 + 3 * 65536 + 512) + 256)


def test_everything_goes_into_json(result):
    values = json.loads(json.dumps(result.to_dict()))
    assert set(values) == {
        "prompt",
        "tokens",
        "text",
        "matched",
        "tokens_per_second",
        "memory",
        "report",
        "device",
        "versions",
    }
    assert values["tokens"] == result.tlk.tokens and values["matched"] is True
    assert values["memory"]["kv_cache_bytes"]["tlk"] == result.tlk.kv_cache_bytes
    assert values["versions"]["torch"] == torch.__version__


def test_a_mismatch_is_shown_with_its_place(result):
    tokens = result.tlk.tokens.copy()
    tokens[4] += 1
    other = replace(result, tlk=replace(result.tlk, tokens=tokens))
    assert not other.matched and other.to_dict()["matched"] is False
    assert "MISMATCH: the first 4 agree" in str(other)
    shorter = replace(result, tlk=replace(result.tlk, tokens=tokens[:3]))
    assert not shorter.matched and "the first 3 agree" in str(shorter)


def test_the_device_says_what_runs(result):
    compiled = "kernels are compiled" in result.device and "no kernels" not in result.device
    assert compiled == torch.cuda.is_available()
