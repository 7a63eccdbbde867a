"""One op at one real shape: its inputs, its work, its peers."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """Makes a case's tensors: random ones to run, or uninitialized ones to compile for."""

    device: str
    dtype: torch.dtype
    empty: bool = False

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        make = torch.empty if self.empty else torch.randn
        return make(*shape, device=self.device, dtype=dtype or self.dtype)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        if self.empty:
            return torch.empty(*shape, device=self.device, dtype=dtype)
        return torch.randint(low, high, shape, device=self.device, dtype=dtype)

    def tensor(self, values: Sequence[int | float], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Case:
    """`run(*inputs(Inputs(...)))` executes op `op` once.

    `bytes(itemsize)` is what must move through device memory at least once, `flops` the
    multiply-adds counted twice. `reference` and `peers` take the same arguments as `run`.
    `options` are what `run` knows beside the tensors, for peers of other packages
    (`tlk.bench.kernel_peers`). A case without `gate` is timed but not compiled ahead of time:
    its kernels are those of another case. Below the capability `oldest` no kernel runs it.
    `gathers` names kernels that read single elements where the data say, and few of them.
    `tolerance` bounds the error of the whole output, in the root-mean-square sense, against
    `reference` (bf16 rounds each value by up to 2⁻⁹ = 0.2 %); of integers, the share that differs.
    """

    op: str
    shape: str
    inputs: Callable[[Inputs], tuple[Any, ...]]
    run: Callable[..., Any]
    bytes: Callable[[int], int]
    reference: Callable[..., Any]
    flops: int = 0
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    options: Mapping[str, Any] = field(default_factory=dict)
    gate: bool = True
    oldest: int = 75
    gathers: tuple[str, ...] = ()
    tolerance: float = 0.01

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}"


def load_cases() -> dict[str, tuple[Case, ...]]:
    """The cases of every module in `tlk.bench.cases`, by module name."""
    package = importlib.import_module("tlk.bench.cases")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"tlk.bench.cases.{name}").CASES for name in names}
