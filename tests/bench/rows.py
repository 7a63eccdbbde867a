"""Rows made up for tests of what is done with rows."""

from tlk.bench.kernels import PeerResult, Row
from tlk.bench.limits import Bound
from tlk.bench.timing import Spread


def spread(us: float) -> Spread:
    return Spread(us * 1e-6, us * 0.9e-6, us * 1.1e-6, 5)


def row(
    op="rms_norm", shape="T8192-N4096", us=50.0, peers=None, unit="TB/s", bound_us=40.0,
    nbytes=134_225_920, flops=0, dtype="bfloat16",
) -> Row:  # fmt: skip
    """`peers`: microseconds by name, or the reason why there are none."""
    results = {
        name: PeerResult(reason=value) if isinstance(value, str) else PeerResult(spread(value), None, "1.2")
        for name, value in (peers or {}).items()
    }  # fmt: skip
    by = "copy" if unit == "TB/s" else f"{dtype} matmul"
    return Row(
        op, shape, dtype, dtype, nbytes, flops, spread(us), Bound(bound_us * 1e-6, by, unit), results
    )  # fmt: skip
