"""The MLPs of a decoder layer: norm(x) goes in, the residual stream comes out."""

from torch import Tensor, nn

from tlk.errors import UnsupportedError
from tlk.kernels.gated_linear import ACTIVATIONS
from tlk.models.config import GatedMLPConfig, MLPConfig
from tlk.models.layers import LayerNorm, Linear, RMSNorm
from tlk.quant.format import DENSE, Format


class GatedMLP(nn.Module):
    """x + down(act(gate(norm(x))) · up(norm(x))), gate and up in one weight, gate's rows first."""

    def __init__(self, config: GatedMLPConfig, hidden_size: int, format: Format = DENSE) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UnsupportedError(f"activation {config.activation!r} of a gated MLP: not {known}")
        self.activation = config.activation
        bias, size = config.bias, config.size
        self.gate_up = Linear(hidden_size, 2 * size, bias=bias, format=format, split="out")
        self.down = Linear(size, hidden_size, bias=bias, format=format, split="in")

    def forward(self, x: Tensor, norm: RMSNorm | LayerNorm, in_place: bool = False) -> Tensor:
        """`x` [T, hidden] plus the MLP of norm(x); `in_place`: the sum may be written over `x`."""
        if self.gate_up.rounds(x) and self.down.rounds(x):
            # act(gate) · up and its rounding are one kernel
            both = self.gate_up(x, norm)
            return self.down(both, residual=x, in_place=in_place, gate=self.activation)
        y = self.gate_up.gated(x, norm, self.activation)
        return self.down(y, residual=x, in_place=in_place)


class MLP(nn.Module):
    """x + down(act(up(norm(x)))), the activation applied by the first matmul."""

    def __init__(self, config: MLPConfig, hidden_size: int, format: Format = DENSE) -> None:
        super().__init__()
        self.activation = config.activation
        bias, size = config.bias, config.size
        self.up = Linear(hidden_size, size, bias=bias, format=format, split="out")
        self.down = Linear(size, hidden_size, bias=bias, format=format, split="in")

    def forward(self, x: Tensor, norm: RMSNorm | LayerNorm, in_place: bool = False) -> Tensor:
        """`x` [T, hidden] plus the MLP of norm(x); `in_place`: the sum may be written over `x`."""
        y = self.up(x, norm, activation=self.activation)
        return self.down(y, residual=x, in_place=in_place)
