"""Turn a Triton launcher into a torch op, and count what ran."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from subprocess import CalledProcessError
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tlk.kernels.toolchain import require_c_compiler

P = ParamSpec("P")
R = TypeVar("R")

# Library.define costs about 2 µs a call; custom_op 7-13 µs (torch 2.13, CPU).
_LIB = torch.library.Library("tlk", "DEF")
_BACKENDS: dict[str, Callable[..., str]] = {}

# (capability, multiprocessors) that kernels launched on CPU tensors pretend to run on.
# None: ops on CPU tensors run their references.
_PRETENDED: ContextVar[tuple[int, int] | None] = ContextVar("tlk_pretended_device", default=None)


@contextmanager
def kernels_on_cpu(sm: int = 90, sm_count: int = 8) -> Iterator[None]:
    """Launch kernels on CPU tensors too, as on a GPU of capability `sm` with `sm_count` SMs.

    For an interpreter or a dry run. Eight SMs let small tests see several waves.
    """
    token = _PRETENDED.set((sm, sm_count))
    try:
        yield
    finally:
        _PRETENDED.reset(token)


def pretended_device() -> tuple[int, int] | None:
    """The (capability, SM count) given to `kernels_on_cpu`, or None outside of it."""
    return _PRETENDED.get()


def op(
    reference: Callable[P, R],
    *,
    mutates: tuple[str, ...] = (),
    fake: Callable[..., Any] | None = None,
    backend: Callable[..., str] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the launcher `_name` as ``torch.ops.tlk.name``.

    `reference` is plain PyTorch and serves three times: it is the op on CPU, the shape rule
    under torch.compile, and the oracle its tests compare against. `fake` replaces the shape rule
    where the reference reads data. `backend(*args)` names what the launcher will run ("triton",
    "cublas", "sdpa"), for ops that choose; it must decide from shapes, dtypes and the device.
    """

    def register(launch: Callable[P, R]) -> Callable[P, R]:
        name = launch.__name__.removeprefix("_")

        def kernel(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return launch(*args, **kwargs)
            except (RuntimeError, CalledProcessError):
                require_c_compiler()  # if it is missing, that is the error to report
                raise

        def on_cuda(*args: P.args, **kwargs: P.kwargs) -> R:
            index = args[0].device.index  # type: ignore[attr-defined]
            if index == torch.cuda.current_device():
                return kernel(*args, **kwargs)
            with torch.cuda.device(index):  # Triton launches on the current device
                return kernel(*args, **kwargs)

        def on_cpu(*args: P.args, **kwargs: P.kwargs) -> R:
            run = reference if _PRETENDED.get() is None else kernel
            return run(*args, **kwargs)

        _LIB.define(name + torch.library.infer_schema(launch, mutates_args=mutates))
        _LIB.impl(name, on_cuda, "CUDA")
        _LIB.impl(name, on_cpu, "CPU")
        torch.library.register_fake(f"tlk::{name}", fake or reference, lib=_LIB)
        if backend is not None:
            _BACKENDS[name] = backend
        return getattr(torch.ops.tlk, name).default

    return register


class count_ops(TorchDispatchMode):
    """Count the tlk ops that run inside the block, by name and by what ran them.

    with count_ops() as counts: ...
    counts["rms_norm[triton]"]      # "reference" on a CPU, "triton" or what the op chose on a GPU
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Counter[str]:
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "tlk":
            name = func._schema.name.removeprefix("tlk::")
            self.counts[f"{name}[{_runner(name, args, kwargs)}]"] += 1
        return func(*args, **kwargs)


def _runner(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    if tensors[0].device.type == "cpu" and _PRETENDED.get() is None:
        return "reference"
    return _BACKENDS[name](*args, **kwargs) if name in _BACKENDS else "triton"
