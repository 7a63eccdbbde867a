"""Jit functions that several kernel files share."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """ACTIVATION of float32 `x`: None, "silu", "gelu", "gelu_tanh" or "relu_squared"."""
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 · (1 + tanh(t)) = 1 / (1 + exp(−2t)), which overflows to the right limits
        t = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * t))
    elif ACTIVATION == "relu_squared":
        x = tl.maximum(x, 0.0)
        x = x * x
    return x
