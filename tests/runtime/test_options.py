import pytest
import torch

from tlk.errors import UnsupportedError
from tlk.runtime.options import EngineOptions, pick_device


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", 0), ("max_num_seqs", 0), ("max_num_batched_tokens", -1), ("page_size", 0),
        ("kv_cache_memory", 0), ("gpu_memory_utilization", 0.0), ("gpu_memory_utilization", 1.1),
    ],
)  # fmt: skip
def test_bounds(field, value):
    with pytest.raises(ValueError, match=f"{field} must"):
        EngineOptions(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_num_seqs", 2.0), ("max_num_seqs", True), ("kv_cache_memory", 1e9), ("seed", "x"),
     ("gpu_memory_utilization", "most")],
)  # fmt: skip
def test_types(field, value):
    with pytest.raises(TypeError, match=f"{field} must"):
        EngineOptions(**{field: value})


def test_caches_without_a_kernel_are_refused():
    with pytest.raises(UnsupportedError, match=r"'double' has no kernel; these have: auto, .*int8"):
        EngineOptions(kv_cache_dtype="double")


def test_the_dtype_of_the_cache():
    assert EngineOptions().kv_dtype(torch.float16) == torch.float16
    assert EngineOptions(kv_cache_dtype="bfloat16").kv_dtype(torch.float32) == torch.bfloat16
    assert EngineOptions(kv_cache_dtype="fp8").kv_dtype(torch.float32) == torch.float8_e4m3fn
    assert EngineOptions(kv_cache_dtype="int8").kv_dtype(torch.bfloat16) == torch.int8


def test_a_device_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1").index == 1 and pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        pick_device("gpu")
    with pytest.raises(UnsupportedError, match="tlk runs on cpu and cuda"):
        pick_device("meta")
    with pytest.raises(UnsupportedError, match="torch finds no GPU here, `tlk doctor`"):
        pick_device("cuda")
