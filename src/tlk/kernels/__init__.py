"""Fused GPU operations on plain tensors. Knows torch and triton, and nothing else of tlk.

On a CPU every operation runs as its PyTorch reference.
"""

from tlk.kernels._op import count_ops
from tlk.kernels.act_quant import gated_quant, quantize_act, rms_norm_quant
from tlk.kernels.activation import gelu_and_mul, relu_squared, silu_and_mul
from tlk.kernels.dequant_mm import dequant_mm
from tlk.kernels.dequantize import dequantize
from tlk.kernels.flash_attention import flash_attention
from tlk.kernels.gated_linear import gated_linear
from tlk.kernels.kv_cache import write_kv_
from tlk.kernels.likeliest import likeliest_
from tlk.kernels.matmul import matmul, matmul_add_
from tlk.kernels.norm import add_rms_norm, layer_norm, rms_norm
from tlk.kernels.norm_linear import norm_linear
from tlk.kernels.paged_attention import paged_attention
from tlk.kernels.rope import rope_and_write_kv_
from tlk.kernels.sampling import apply_penalties_, sample, top_logprobs
from tlk.kernels.scaled_mm import scaled_mm
from tlk.kernels.step import expand_step

__all__ = [
    "add_rms_norm",
    "apply_penalties_",
    "count_ops",
    "dequant_mm",
    "dequantize",
    "expand_step",
    "flash_attention",
    "gated_linear",
    "gated_quant",
    "gelu_and_mul",
    "layer_norm",
    "likeliest_",
    "matmul",
    "matmul_add_",
    "norm_linear",
    "paged_attention",
    "quantize_act",
    "relu_squared",
    "rms_norm",
    "rms_norm_quant",
    "rope_and_write_kv_",
    "sample",
    "scaled_mm",
    "silu_and_mul",
    "top_logprobs",
    "write_kv_",
]
