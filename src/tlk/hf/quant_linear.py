"""A linear layer of a transformers model whose weight is quantized, under the name it had.

tlk's decoder multiplies by the stored codes; called as a module of transformers, it dequantizes its
weight and multiplies as `nn.Linear` does, so that the original forward stays right, if slow.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlk.quant.format import Format, Packed, fuse, prepare_input, rows


class QuantLinear(nn.Module):
    """y = x · Wᵀ + bias, with W [out_features, in_features] stored as `packed` in `format`.

    The packed tensors are buffers under their own names. dtype: what activations and the bias are.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        packed: Packed,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.dtype, self.packed_names = format, dtype, tuple(packed)
        self.register_parameter("bias", bias)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)

    def packed(self) -> Packed:
        """The stored tensors by name."""
        return {name: self.get_buffer(name) for name in self.packed_names}

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` [..., in_features] by the dequantized weight."""
        packed = self.packed()
        x, _ = prepare_input(x, packed, None)
        return F.linear(x, self.format.dequantize(packed, x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to another device; a change of dtype raises ValueError, for codes and scales have their own."""
        device = self.get_buffer("weight").device
        changed = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        if changed != self.dtype:
            raise ValueError(
                f"dtype must stay {self.dtype} in a quantized model, got {changed}: "
                "load it again in the dtype that it is to have"
            )
        for name in self.packed_names:
            tensor = self._buffers[name]
            assert tensor is not None
            moved = fn(tensor.contiguous().view(torch.uint8))
            self._buffers[name] = moved.view(tensor.dtype)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, format={self.format}"


def quantized_like(
    linear: nn.Linear, format: Format, packed: Packed, dtype: torch.dtype | None = None
) -> QuantLinear:
    """What takes the place of `linear` when its weight is stored as `packed`; the bias is shared.

    dtype: that of its activations; None is that of the weight.
    """
    shape, bias = (linear.in_features, linear.out_features), linear.bias
    dtype = dtype or linear.weight.dtype
    return QuantLinear(*shape, format, packed, bias, dtype).train(linear.training)


def fused(modules: list[QuantLinear]) -> Packed:
    """The packed tensors of layers that read the same input, in one storage each; theirs become views.

    Raises ValueError if the layers cannot be fused.
    """
    if len(modules) == 1:
        return modules[0].packed()
    whole = fuse([m.packed() for m in modules])
    start = 0
    for m in modules:
        for name, view in rows(whole, start, start + m.out_features).items():
            m._buffers[name] = view
        start += m.out_features
    return whole
