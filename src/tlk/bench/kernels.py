"""Time the cases of the kernels and their peers: first the result, then the clock.

Every case is checked against its float32 reference in the dtype and at the shape that is timed; a
wrong result raises and is never a row. Peers are checked in the same way, on the same inputs, and one that
is absent, refuses the case or is wrong stands in the row with its reason.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tlk.bench.case import Case, Inputs
from tlk.bench.kernel_peers import peers_of
from tlk.bench.kernel_peers.peer import PEER_ERRORS, Peer, reason
from tlk.bench.limits import Bound, Limits, bound
from tlk.bench.timing import Call, Spread, copies, time_calls
from tlk.errors import TlkError, UnsupportedError

SEED = 1234
MAX_CPU_BYTES, MAX_CPU_FLOPS = 16 << 20, 1 << 30


class WrongResultError(TlkError, AssertionError):
    """A kernel does not give what its reference gives: the message names the case and by how much."""


@dataclass(frozen=True, slots=True)
class PeerResult:
    """What a peer took, or the reason why it is not in the row."""

    seconds: Spread | None = None
    reason: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One case in one dtype: its time, its limit, and its peers. `operands`: dtype of the first tensor."""

    op: str
    shape: str
    dtype: str
    operands: str
    bytes: int
    flops: int
    seconds: Spread
    bound: Bound
    peers: dict[str, PeerResult] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.shape} {self.dtype}"

    def speed(self, seconds: float | None = None) -> float:
        """Of `seconds`, by default its own: in `bound.unit`."""
        work = self.flops if self.bound.unit == "TFLOP/s" else self.bytes
        return work / (seconds or self.seconds.median) / 1e12

    def of_limit(self) -> float:
        """The share of the ceiling that is reached."""
        return self.bound.seconds / self.seconds.median

    def ratio(self, peer: str) -> float | None:
        """How many times as fast as `peer`; None if that has no time here."""
        taken = self.peers[peer].seconds if peer in self.peers else None
        return None if taken is None else taken.median / self.seconds.median


@dataclass(frozen=True, slots=True)
class Bench:
    """How to measure. `wanted(name)`: whether a peer is; `limits`: of `device`, in this run."""

    device: torch.device
    limits: Limits
    repeats: int = 20
    wanted: Callable[[str], bool] = lambda name: True

    @torch.no_grad()
    def row(self, case: Case, dtype: torch.dtype) -> Row:
        """Check, then time. Raises WrongResultError, or what the kernel itself raises."""
        make = Inputs(self.device.type, dtype)
        inputs, expected, written = checked(case, make)
        nbytes = case.bytes(dtype.itemsize)
        operands = name_of(next(t.dtype for t in tensors(inputs)))
        sets = [inputs, *(seeded(case, make, i) for i in range(1, self._copies(nbytes)))]
        calls = [_bound_call(case.run, values) for values in sets]
        taken = time_calls(calls, self.repeats, self.device)
        limit = bound(self.limits, nbytes, case.flops, written, operands)
        row = Row(
            case.op, case.shape, name_of(dtype), operands, nbytes, case.flops, taken, limit
        )  # fmt: skip
        for peer in peers_of(case):
            if self.wanted(peer.name):
                row.peers[peer.name] = self._peer(peer, case, make, expected, sets)
        return row

    def _copies(self, nbytes: int) -> int:
        return copies(nbytes) if self.device.type == "cuda" else 1

    def _peer(
        self, peer: Peer, case: Case, make: Inputs, expected: list[Tensor], sets: list[Any]
    ) -> PeerResult:
        try:
            peer.require()
            if peer.compared:
                fresh = seeded(case, make, 0)
                tolerance = max(peer.tolerance, 2 * case.tolerance)
                _compare(peer.prepare(case, fresh)(), fresh, expected, tolerance)
                del fresh
            calls = [peer.prepare(case, values) for values in sets]
            taken = time_calls(calls, self.repeats, self.device)
        except PEER_ERRORS as error:
            return PeerResult(reason=reason(error), version=peer.version())
        finally:
            torch.compiler.reset()  # else the ninth shape of a function would stay uncompiled
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return PeerResult(taken, version=peer.version())


def name_of(dtype: torch.dtype) -> str:
    """float32, and not torch.float32."""
    return str(dtype).removeprefix("torch.")


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a result or of inputs, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def seeded(case: Case, make: Inputs, index: int) -> tuple[Any, ...]:
    """The inputs number `index`: the same values each time."""
    torch.manual_seed(SEED + index)
    return case.inputs(make)


def checked(case: Case, make: Inputs) -> tuple[tuple[Any, ...], list[Tensor], int]:
    """Inputs that the case has run on, what its peers must give for them, and the bytes it wrote.

    Raises WrongResultError if `run` does not return and write what `reference` does.
    """
    inputs, like = seeded(case, make, 0), seeded(case, make, 0)
    actual, expected = case.run(*inputs), case.reference(*like)
    given, wanted = tensors([actual, inputs]), tensors([expected, like])
    if len(given) != len(wanted):
        raise WrongResultError(f"{case}: {len(given)} tensors, its reference has {len(wanted)}")
    for position, (a, e) in enumerate(zip(given, wanted, strict=True)):
        if a.shape != e.shape or a.dtype != e.dtype:
            raise WrongResultError(
                f"{case}: tensor {position} is {a.dtype} {tuple(a.shape)}, "
                f"not {e.dtype} {tuple(e.shape)}"
            )
        if not (wrong := difference(a, e)) <= case.tolerance:
            raise WrongResultError(f"{case}: tensor {position} is off by {wrong:.2%}")
    written = sum(t.nbytes for t in tensors(actual)) or case.bytes(make.dtype.itemsize)
    return inputs, tensors(expected) or tensors(like), written


def difference(actual: Tensor, expected: Tensor) -> float:
    """The root-mean-square error relative to `expected`; of integers, the share that differs."""
    if actual.shape != expected.shape:
        raise WrongResultError(f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if expected.dtype.is_floating_point:
        error = (actual.float() - expected.float()).norm()
        return float(error / expected.float().norm().clamp(min=1e-30))
    return float((actual != expected).float().mean()) if actual.numel() else 0.0


def _compare(
    result: Any, inputs: tuple[Any, ...], expected: list[Tensor], tolerance: float
) -> None:
    """Where the case returns nothing its inputs are compared, which peers that write must write."""
    given = tensors(result) or tensors(inputs)
    if len(given) != len(expected):
        raise UnsupportedError(f"it gives {len(given)} tensors, not {len(expected)}")
    for a, e in zip(given, expected, strict=True):
        wrong = difference(a.reshape(e.shape) if a.numel() == e.numel() else a, e)
        if not wrong <= tolerance:
            raise UnsupportedError(f"its result is off by {wrong:.2%}")


def _bound_call(run: Callable[..., Any], values: tuple[Any, ...]) -> Call:
    return lambda: run(*values)


def small(case: Case, dtype: torch.dtype) -> bool:
    """Whether a CPU can run the case in a moment."""
    return case.bytes(dtype.itemsize) <= MAX_CPU_BYTES and case.flops <= MAX_CPU_FLOPS


def dtypes_of(case: Case, wanted: torch.dtype | None, every: bool) -> Iterable[torch.dtype]:
    """The dtypes to measure a case in: its first by default, `wanted` if it has that, or every one."""
    if every:
        return case.dtypes
    if wanted is None:
        return case.dtypes[:1]
    return (wanted,) if wanted in case.dtypes else ()
