import pytest

from tests.llm.models import SMALL, make
from tests.models.zoo import tiny
from tlk.errors import CapacityError, UnsupportedError
from tlk.llm import LLM, AsyncLLM
from tlk.llm.frontend import Frontend


def test_the_start_says_what_it_took(capsys):
    with make(LLM) as llm:
        said = capsys.readouterr().err
        assert str(llm.ledger) in said and "start: load " in said
        assert llm.ledger.weights > 7_000_000 and llm.ledger.kv_cache == 3 * 2 * 16 * 256 * 256 * 2
        assert llm.timings["load"] > 0
        assert llm.max_model_len == 256 and llm.notices == []


def test_a_context_that_does_not_fit_is_fitted_down_with_a_notice(capsys):
    with make(LLM, kv_cache_memory=1 << 18) as llm:
        said = capsys.readouterr().err
        assert llm.max_model_len < 256
        (notice,) = llm.notices
        assert notice in said.splitlines() and str(llm.max_model_len) in notice


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantization": "int4-awq"}, ValueError, "calibration must be .* for int4-awq"),
        ({"quantization": "int3"}, ValueError, "method must be one of fp8, .* got 'int3'"),
        ({"kv_cache_dtype": "int4"}, UnsupportedError, "kv_cache_dtype 'int4'"),
        ({"tensor_parallel_size": 2}, UnsupportedError, "tensor_parallel_size 2 .* 1 works"),
        ({"tensor_parallel_size": 0}, ValueError, "tensor_parallel_size must be at least 1"),
        ({"tensor_parallel_size": True}, TypeError, "tensor_parallel_size must be a whole"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, got 0"),
        ({"gpu_memory_utilization": 1.5}, ValueError, "gpu_memory_utilization"),
        ({"dtype": "float8"}, ValueError, "dtype must be auto, float32"),
        ({"kv_cache_memory": 1}, CapacityError, "raise kv_cache_memory"),
    ],
)
@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_what_is_refused(kind, options, error, message):
    with pytest.raises(error, match=message):
        make(kind, **options)


def test_every_option_reaches_the_engine():
    options = {
        "max_model_len": 48,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 17,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory": 1 << 20,
        "kv_cache_dtype": "float32",
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "deterministic": True,
        "seed": 7,
    }
    with LLM(tiny("llama"), **options) as llm:
        for name, value in options.items():
            assert getattr(llm.engine.options, name) == value


def test_both_have_the_same_arguments():
    assert LLM.__init__ is AsyncLLM.__init__ is Frontend.__init__
    assert {*SMALL} <= {*LLM.__init__.__annotations__}
