"""GPTQ: round a weight column by column, and let the columns to come make up for the error.

What counts is ‖X·(W − Q)ᵀ‖² on the inputs X that the layer saw, and of those only H = XᵀX matters:

    H += λ · mean(diag H) · I          inv(H) = Uᵀ·U, U upper triangular
    q_c = nearest point of the grid to w_c      e_c = (w_c − q_c) / U_cc      W ← W − e_c · U_c

Frantar et al., https://arxiv.org/abs/2210.17323. Blocks of 128 columns are one kernel
(kernels/gptq_block.py), what they do to the rest of W is one matmul. U comes from one Cholesky
factorization: with J the reversal of order, J·H·J = L·Lᵀ gives U = (J·L·J)⁻¹, and no inverse of H is
formed. Columns of large diag H go first (act order); the scales are those of the weight as it was, in
groups of neighbours, so that the file needs no order of its own.

Cost of an [N, K] weight: N·K² multiply-adds, and about K³ for U.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tlk.kernels.gptq_block import BLOCK, Grid, decode_reference, gptq_block

DAMPING = 0.01


class Hessian:
    """Σ xᵀx over the inputs x that a linear layer saw, float32 [K, K]; a factor would not matter."""

    def __init__(self, inputs: int, device: torch.device | str) -> None:
        self.matrix = torch.zeros(inputs, inputs, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count `x` [..., K] in. Products of 16-bit inputs are exact in float32, where they are summed."""
        rows = x.reshape(-1, x.shape[-1])
        self.tokens += rows.shape[0]
        if rows.is_cuda and rows.dtype != torch.float32:
            self.matrix += torch.mm(rows.t(), rows, out_dtype=torch.float32)
        else:
            self.matrix.addmm_(rows.float().t(), rows.float())


@dataclass(frozen=True, slots=True)
class Lattice:
    """The points that a weight [N, K] may be rounded to, in groups of K / g neighbouring inputs.

    scale float32 [N, g]; zero float32 [N, g] or None; codes run to `top` in the grid "int".
    """

    scale: Tensor
    zero: Tensor | None
    grid: Grid = "int"
    top: int = 15

    def columns(self, group: Tensor) -> "Lattice":
        """The lattice of single inputs, of the groups `group` [B] int64."""
        zero = None if self.zero is None else self.zero[:, group]
        return Lattice(self.scale[:, group], zero, self.grid, self.top)

    def values(self, codes: Tensor) -> Tensor:
        """What `codes` [N, B] stand for, of a lattice of single inputs."""
        return decode_reference(codes.float(), self.zero, self.grid) * self.scale


Find = Callable[[Tensor], Lattice]
"""The lattice for a part [N, some whole groups] of a weight."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """values: the weight on its lattice, float32 [N, K]. loss: Σ e² / 2. damping: what it took."""

    values: Tensor
    lattice: Lattice
    loss: float
    damping: float


class Indefinite(ArithmeticError):
    """The Hessian has no inverse, however much is added to its diagonal."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    find: Find,
    group_size: int | None = None,
    *,
    act_order: bool = True,
    static_groups: bool = True,
    damping: float = DAMPING,
) -> Rounding:
    """Round `weight` [N, K] so that its product with inputs of `hessian` float32 [K, K] changes little.

    find: gives the lattice of a weight, whose groups have `group_size` inputs (None: K). act_order:
    inputs with much energy first. static_groups: all scales from the weight as it came; else each from
    what the weight has become when its group's turn comes, which needs the natural order. `damping`
    is added to the diagonal relative to its mean, and grows in steps of 0.01 up to 1 while the
    Hessian is not positive definite. `hessian` and `weight` are left as they are.

    Raises Indefinite if that does not help, ValueError for arguments that do not fit.
    """
    k = weight.shape[1]
    size = group_size or k
    if hessian.shape != (k, k):
        raise ValueError(f"hessian must have shape {(k, k)}, got {tuple(hessian.shape)}")
    if k % size:
        raise ValueError(f"group_size must divide the {k} inputs, got {group_size}")
    if act_order and not static_groups:
        raise ValueError("act_order must be False where groups are not static")
    w, h = weight.to(torch.float32, copy=True), hessian.to(torch.float32, copy=True)
    _bury_dead(w, h)
    lattice = find(w) if static_groups else None
    order = torch.arange(k, device=w.device)
    if act_order:
        order = h.diagonal().argsort(descending=True)
        w, h = w[:, order], h[order][:, order]
    u, damping = factor(h, damping)
    del h
    values, lattice, loss = _walk(w, u, order // size, lattice, find, size)
    if act_order:
        values = values[:, order.argsort()]
    return Rounding(values, lattice, loss, damping)


def _walk(
    w: Tensor, u: Tensor, groups: Tensor, static: Lattice | None, find: Find, size: int
) -> tuple[Tensor, Lattice, float]:
    """Round the columns of `w` in their order, writing over it; `groups` [K] are theirs in the lattice."""
    values, loss = torch.empty_like(w), torch.zeros((), device=w.device)
    parts = [] if static is None else [static]
    for start in range(0, w.shape[1], BLOCK):
        here = slice(start, min(start + BLOCK, w.shape[1]))
        if static is None:
            parts += _found(w, find, size, here)
        columns = _joined(parts).columns(groups[here])
        codes, errors = gptq_block(
            w[:, here], u[here, here], columns.scale, columns.zero,
            grid=columns.grid, top=columns.top,
        )  # fmt: skip
        w[:, here.stop :].addmm_(errors, u[here, here.stop :], alpha=-1)
        values[:, here] = columns.values(codes)
        loss += errors.square().sum() / 2
    return values, _joined(parts), float(loss)


def _bury_dead(w: Tensor, h: Tensor) -> None:
    """Inputs that were always 0 get weights of 0 and a curvature of 1."""
    dead = h.diagonal() == 0
    h.diagonal().masked_fill_(dead, 1.0)
    w.masked_fill_(dead, 0.0)


def factor(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """Upper U [K, K] with UᵀU = inv(hessian + damping · mean · I), and the damping it took.

    Raises Indefinite where no damping below 1 is enough. `hessian` is written over.
    """
    diagonal = hessian.diagonal()
    unit = float(diagonal.mean())
    added = 0.0
    while damping < 1:
        diagonal += (damping - added) * unit
        added = damping
        lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if int(info) == 0 and bool(lower.diagonal().isfinite().all()):
            eye = torch.eye(len(lower), device=lower.device, dtype=lower.dtype)
            transposed = lower.flip(0, 1).mT  # so that the rows of U come out contiguous
            return torch.linalg.solve_triangular(transposed, eye, upper=False).mT, damping
        damping += 0.01
    raise Indefinite(f"the Hessian is not positive definite with {added:.2f} of its mean added")


def _found(w: Tensor, find: Find, size: int, here: slice) -> list[Lattice]:
    """The lattices of the groups that begin in the columns `here`, from `w` as it is."""
    first = -(-here.start // size) * size
    return [find(w[:, c : c + size]) for c in range(first, here.stop, size)]


def _joined(parts: list[Lattice]) -> Lattice:
    if len(parts) == 1:
        return parts[0]
    zeros = [p.zero for p in parts if p.zero is not None]
    return Lattice(
        torch.cat([p.scale for p in parts], 1),
        torch.cat(zeros, 1) if zeros else None,
        parts[0].grid,
        parts[0].top,
    )
