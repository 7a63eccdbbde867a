import json
import re

import pytest
import torch

from tests.quant.golden.load import FOLDER, cases, check, script_hash, versions
from tlk.errors import CheckpointError, UnsupportedError
from tlk.quant.files.recognise import METHODS, method_of, recognise
from tlk.quant.int4 import Int4

TOOLS = ("gptqmodel", "autoawq", "compressed_tensors", "bitsandbytes", "modelopt")
ALL = [(tool, name) for tool in TOOLS for name in cases(tool)]


@pytest.mark.parametrize("tool", TOOLS)
def test_golden_files_are_of_the_scripts_beside_them(tool):
    now, then = script_hash(tool)
    assert now == then, f"run make_{tool}.py again: it has changed since it wrote its file"
    assert re.match(r"\d+\.\d+", versions(tool)[tool.replace("_", "-")])
    assert (FOLDER / f"{tool}.safetensors").stat().st_size < 2**20


@pytest.mark.parametrize("tool, name", ALL, ids=str)
def test_what_the_original_tools_packed_is_read_bit_by_bit(tool, name):
    case = cases(tool)[name]
    scheme = recognise(case.config)
    module = "model.layers.0.mlp.down_proj"
    assert scheme.holds(case.tensors) and scheme.listed(module) is not False
    format, packed = scheme.read(module, case.tensors, case.shape)
    weight = format.dequantize(packed)
    if (perm := packed.get("perm")) is not None:
        weight = torch.empty_like(weight).index_copy_(1, perm[0].long(), weight)
    check(case, weight)
    assert all(t.is_contiguous() and t.dim() == 2 for t in packed.values())
    empty = format.empty(*case.shape, "meta", packed["scale"].dtype)
    for key, tensor in empty.items():
        assert packed[key].shape == tensor.shape and packed[key].dtype == tensor.dtype, key
    assert packed.keys() - empty.keys() <= {"perm", "pre_scale", "input_scale"}


@pytest.mark.parametrize("tool, name", ALL, ids=str)
def test_truncated_and_missing_tensors_are_named(tool, name):
    case = cases(tool)[name]
    scheme = recognise(case.config)
    for suffix, tensor in case.tensors.items():
        others = {k: t for k, t in case.tensors.items() if k != suffix}
        if tensor.dim() and tensor.numel() > 1:
            with pytest.raises(
                (CheckpointError, UnsupportedError), match=rf"some\.layer.*{suffix}"
            ):
                scheme.read("some.layer", others | {suffix: tensor[:-1]}, case.shape)
        if suffix in (
            "g_idx",
            "weight_format",
            "input_scale",
            "pre_quant_scale",
            "input_global_scale",
        ):
            continue  # the file may leave them out
        if suffix in ("SCB", "weight.nested_absmax"):
            continue  # what says how the rest is stored
        with pytest.raises(CheckpointError, match=r"some\.layer"):
            scheme.read("some.layer", others, case.shape)
    with pytest.raises(CheckpointError, match=r"some\.layer has tensors .* format: surplus"):
        scheme.read("some.layer", case.tensors | {"surplus": torch.zeros(1)}, case.shape)
    with pytest.raises(CheckpointError, match=r"some\.layer"):
        scheme.read("some.layer", case.tensors, (case.shape[0] + 128, case.shape[1]))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("tool, name", ALL, ids=str)
def test_scales_that_are_no_numbers_are_refused(tool, name, bad):
    case = cases(tool)[name]
    scheme = recognise(case.config)
    for suffix in ("scales", "weight_scale", "SCB", "weight_scale_2", "weight_global_scale"):
        if suffix not in case.tensors or not case.tensors[suffix].is_floating_point():
            continue
        if case.tensors[suffix].dtype == torch.float8_e4m3fn and bad == float("inf"):
            continue  # it has no infinity
        changed = case.tensors[suffix].float().clone()
        changed.view(-1)[-1] = bad
        changed = {suffix: changed.to(case.tensors[suffix].dtype)}
        if suffix == "SCB" and bad == 0:
            continue  # that of a row of zeros
        with pytest.raises(
            CheckpointError, match=rf"some\.layer\.{suffix} holds (1 scales|values)"
        ):
            scheme.read("some.layer", case.tensors | changed, case.shape)


@pytest.mark.parametrize(
    "fields, method",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "awq"),
        ({"quantization": {"quant_algo": "FP8"}}, "modelopt"),
        ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, "modelopt"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
    ],
)
def test_methods_are_recognised(fields, method):
    assert method_of(fields) == method and recognise(fields).method == method


@pytest.mark.parametrize("method", ["quanto", "hqq", "aqlm", "torchao", "mxfp8", "mxfp4", "nvfp4"])
def test_unknown_methods_raise(method):
    with pytest.raises(UnsupportedError, match=f"quantized with {method}, which tlk does not read"):
        recognise({"quant_method": method})
    assert method not in METHODS


def test_a_config_that_names_no_method_raises():
    with pytest.raises(UnsupportedError, match="a method that it does not name"):
        recognise({"something": json.dumps({})})


GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
}


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"quant_method": "gptq", "bits": 5}, "gptq with bits 5"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"bits": 4, "is_marlin_format": True}, "is of one kernel"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"quant_method": "awq", "version": "gemv"}, "awq with bits 4, version 'gemv'"),
        ({"quant_method": "awq", "backend": "llm-awq"}, "backend 'llm-awq'"),
        ({"quant_method": "awq", "zero_point": False}, "awq without zero points"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [1, 32]}, r"weight_block_size \[1, 32\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "must be dynamic"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "version 'gemv_fast'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "quant_algo 'MXFP8'"),
        ({"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "config_groups": {"a": GROUP}}, "format 'mxfp8-quantized' of a"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "without quantized_layers"),
        ({"quant_method": "compressed-tensors"}, "without config_groups"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"a": GROUP}}, "format 'marlin-24' of a"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}, "config_groups": {"a": GROUP}}, "sparsity_config"),
        ({"quant_method": "compressed-tensors", "transform_config": {"R1": {}}, "config_groups": {"a": GROUP}}, "transform_config"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"]}}}, "a quantizes activations and not weights"),
    ],
)  # fmt: skip
def test_what_tlk_does_not_read_of_a_method_raises(fields, match):
    with pytest.raises(UnsupportedError, match=match):
        recognise(fields)


INTS = {"qzeros": torch.zeros(2, 4, dtype=torch.int32), "scales": torch.ones(2, 32).half()}
UNEVEN = {
    "gptq": ({"bits": 4}, INTS | {"qweight": torch.zeros(24, 32, dtype=torch.int32)}),
    "awq": ({"bits": 4}, INTS | {"qweight": torch.zeros(192, 4, dtype=torch.int32)}),
    "compressed-tensors": (
        {"format": "pack-quantized", "config_groups": {"a": GROUP}},
        {
            "weight_packed": torch.zeros(32, 24, dtype=torch.int32),
            "weight_scale": torch.ones(32, 2),
            "weight_shape": torch.tensor([32, 192]),
        },
    ),
    "modelopt": (
        {"quant_algo": "W4A16_AWQ"},
        {"weight": torch.zeros(16, 192, dtype=torch.uint8), "weight_scale": torch.ones(32, 2)},
    ),
}


@pytest.mark.parametrize("method", UNEVEN)
def test_inputs_that_groups_do_not_divide_are_refused(method):
    """Of 192 inputs in groups of 128 the last is half one; two scales would pass for groups of 96."""
    fields, tensors = UNEVEN[method]
    scheme = recognise({"quant_method": method, "group_size": 128} | fields)
    with pytest.raises(UnsupportedError, match="a has 192 inputs, which groups of 128 do not"):
        scheme.read("a", tensors, (32, 192))


def test_groups_larger_than_the_kernels_are_repeated_and_odd_ones_refused():
    from tlk.quant.files.gptq import GPTQ, write

    codes = torch.randint(16, (32, 512), dtype=torch.uint8)
    scale = torch.rand(32, 2).half() + 0.1
    tensors = write({"scale": scale}, codes)
    format, packed = GPTQ(group_size=256).read("a", tensors, (32, 512))
    assert format == Int4(128) and torch.equal(packed["scale"], scale.repeat_interleave(2, 1))
    scale = torch.rand(32, 32).half() + 0.1
    with pytest.raises(UnsupportedError, match="a has groups of 16 inputs"):
        GPTQ(group_size=16).read("a", write({"scale": scale}, codes), (32, 512))
