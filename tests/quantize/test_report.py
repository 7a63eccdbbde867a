import hashlib

import torch

from tlk.quant.config import QuantConfig
from tlk.quantize.calibration import Calibration
from tlk.quantize.plan import Plan
from tlk.quantize.report import data_sha256, describe
from tlk.quantize.run import Quantized


def test_what_is_told_of_a_quantized_model():
    config = QuantConfig("int4-gptq", group_size=32)
    planned = Plan({}, {"b": "40 inputs"}, ("a", "b"), 1, "int4-gptq")
    layers = {"a": {"weight_error": 0.1, "fallback": "rounded"}, "c": {"weight_error": 0.2}}
    data = Calibration(torch.tensor([[1, 2, 3]]), "1 × 3 token ids")
    result = Quantized(layers, [], 1.26, 5)
    told = describe(config, planned, data, result, torch.device("cpu"), "fp8")
    assert told["method"] == "int4-gptq" and told["config"] == config.to_dict()
    assert told["layers"] == layers and told["fallbacks"] == ["a"]
    assert told["kept_in_16_bit"] == {"b": "40 inputs"} and told["kv_cache_dtype"] == "fp8"
    assert told["calibration"] == "1 × 3 token ids" and told["device"]
    assert told["seconds"] == 1.3 and told["memory_bytes"] == 5
    assert set(told["versions"]) == {"tlk", "torch", "triton", "transformers"}
    assert told["calibration_sha256"] == data_sha256(data)
    assert data_sha256(data) == hashlib.sha256(data.ids.numpy().tobytes()).hexdigest()
    without = describe(config, planned, None, result, torch.device("cpu"))
    assert without["calibration"] is without["calibration_sha256"] is None
