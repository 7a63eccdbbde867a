"""A kernel of another package that does the same work as one of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from subprocess import SubprocessError
from typing import Any

from triton.errors import TritonError

from tlk.bench.case import Case
from tlk.errors import UnsupportedError

Call = Callable[[], Any]

# What a package raises that is absent, too old, or has no kernel for this GPU, dtype or shape.
PEER_ERRORS = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    OSError,
    ArithmeticError,
    SubprocessError,
    TritonError,
    UnsupportedError,
)


@dataclass(frozen=True, slots=True)
class Peer:
    """`prepare(case, inputs)` lays the inputs out as the package wants them and returns the call.

    Only the call is timed. Its result must be within `tolerance` of the reference in the
    root-mean-square sense, after `finish` has made it comparable; a peer that draws its own random
    numbers, or answers in part, states `compared=False`. `package` is what must be installed.
    """

    name: str
    prepare: Callable[[Case, tuple[Any, ...]], Call]
    package: str | None = None
    module: str | None = None
    compared: bool = True
    tolerance: float = 0.02

    def require(self) -> None:
        """Raise UnsupportedError if its package is not installed."""
        if self.package is not None and find_spec(self.module or self.package) is None:
            raise UnsupportedError(f"{self.package} is not installed")

    def version(self) -> str | None:
        """The installed version of its package."""
        try:
            return version(self.package) if self.package is not None else None
        except PackageNotFoundError:
            return None


def plain(run: Callable[..., Any]) -> Callable[[Case, tuple[Any, ...]], Call]:
    """Prepares a peer that takes the inputs as they are."""

    def prepare(case: Case, inputs: tuple[Any, ...]) -> Call:
        return lambda: run(*inputs)

    return prepare


def reason(error: BaseException) -> str:
    """Why a peer is not in a row, in one line."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 240 else f"{text[:160]} … {text[-70:]}"
    return short if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {short}"


def want(holds: bool, what: str) -> None:
    """Raise UnsupportedError: the peer has no kernel for a case unless `what`."""
    if not holds:
        raise UnsupportedError(f"only for {what}")
