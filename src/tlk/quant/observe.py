"""What a calibrator needs to know of the inputs of a linear layer, gathered as they pass."""

import torch
from torch import Tensor

from tlk.quant.gptq import Hessian


class Inputs:
    """Statistics of all the inputs x [..., K] that `add` was given, and some of them.

    mean_abs, mean_square, amax [K] float32; rows [≤ `keep`, K]: every so many'th token; hessian: Σ xᵀx if
    it was asked for. `tokens` is how many will come in all.
    """

    def __init__(
        self,
        inputs: int,
        tokens: int,
        device: torch.device | str,
        *,
        hessian: bool = False,
        keep: int = 2048,
    ) -> None:
        self.tokens, self.seen = tokens, 0
        self.amax = torch.zeros(inputs, device=device)
        self._abs, self._square = torch.zeros_like(self.amax), torch.zeros_like(self.amax)
        self.hessian = Hessian(inputs, device) if hessian else None
        self._step = max(1, -(-tokens // keep))
        self._rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Count `x` [..., K] in."""
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        if self.hessian is not None:
            self.hessian.add(rows)
        self._rows.append(rows[-self.seen % self._step :: self._step].clone())
        self.seen += len(rows)
        for part in rows.split(8192):
            size = part.float().abs()
            self._abs += size.sum(0)
            self._square += size.square().sum(0)
            self.amax = torch.maximum(self.amax, size.amax(0))

    @property
    def mean_abs(self) -> Tensor:
        return self._abs / max(1, self.seen)

    @property
    def mean_square(self) -> Tensor:
        return self._square / max(1, self.seen)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self._rows) if self._rows else self.amax.new_zeros(0, len(self.amax))

    def divide(self, scale: Tensor) -> None:
        """From now on the inputs are x / `scale` [K]."""
        self.amax, self._abs = self.amax / scale, self._abs / scale
        self._square = self._square / scale.square()
        self._rows = [(rows / scale).to(rows.dtype) for rows in self._rows]
        if self.hessian is not None:
            self.hessian.matrix /= scale * scale[:, None]
