"""Golden vectors of compressed-tensors 0.20: its presets, compressed and decompressed by it.

python tests/quant/golden/make_compressed_tensors.py
"""

import compressed_tensors
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from save import Golden

N, K = 32, 256
"""Multiples of 32: the packers of zero points and codes need them."""


def extremes(weight, args):
    """The least and largest of every weight's group, as an observer gives them."""
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        rows, columns = args.block_structure
        blocks = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
        blocks = blocks.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


def compress(golden, case, scheme, dtype=torch.bfloat16, tolerance=0.0):
    linear = torch.nn.Linear(K, N, bias=False, dtype=dtype)
    linear.weight.data = (torch.randn(N, K) * torch.logspace(-2, 0, N)[:, None]).to(dtype)
    initialize_module_for_quantization(linear, scheme, force_zero_point=False)
    args = scheme.weights
    low, high = extremes(linear.weight.data, args)
    divisor = None
    if hasattr(linear, "weight_global_scale"):
        divisor = generate_gparam(linear.weight.min(), linear.weight.max())
        linear.weight_global_scale.data = divisor.reshape(linear.weight_global_scale.shape)
    scale, zero = calculate_qparams(low, high, args, divisor)
    linear.weight_scale.data = scale.to(linear.weight_scale.dtype).reshape(
        linear.weight_scale.shape
    )
    if hasattr(linear, "weight_zero_point"):
        linear.weight_zero_point.data = zero.to(linear.weight_zero_point.dtype).reshape(
            linear.weight_zero_point.shape
        )
    for name in ("input_scale", "input_global_scale"):
        if hasattr(linear, name):
            getattr(linear, name).data.fill_(0.03125)
    linear.quantization_scheme = scheme
    compress_module(linear)
    state = {k: v.detach().clone() for k, v in linear.state_dict().items()}
    format = getattr(linear.quantization_scheme, "format", None)
    decompress_module(linear)
    config = {
        "quant_method": "compressed-tensors",
        "format": str(getattr(format, "value", format)),
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    golden.add(case, state, linear.weight.data, config, tolerance)


def integers(bits, **fields):
    args = QuantizationArgs(num_bits=bits, type="int", **fields)
    return QuantizationScheme(targets=["Linear"], weights=args)


def main():
    torch.manual_seed(0)
    versions = {"compressed-tensors": compressed_tensors.__version__, "torch": torch.__version__}
    golden = Golden(__file__, versions)
    for name in (
        "W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16",
    ):  # fmt: skip
        compress(golden, name, preset_name_to_scheme(name, ["Linear"]))
    for name in ("NVFP4A16", "NVFP4"):  # it multiplies in bfloat16
        compress(golden, name, preset_name_to_scheme(name, ["Linear"]), tolerance=1e-2)
    for bits in (2, 5, 6):
        compress(
            golden, f"int{bits}", integers(bits, strategy="group", group_size=64, symmetric=True)
        )
    compress(golden, "int4_channel", integers(4, strategy="channel", symmetric=True))
    compress(
        golden,
        "int4_half",
        integers(4, strategy="group", group_size=32, symmetric=True),
        torch.float16,
    )
    golden.save()


main()
