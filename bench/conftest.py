"""How the benchmarks measure: on a GPU, after the result was found right, beside the peers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tlk.bench.case import Case, Inputs

# Of the whole output, in the root-mean-square sense: bf16 rounds each value by up to 2⁻⁹ = 0.2 %.
TOLERANCE = 0.01


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Check a case against its reference, then time it and its peers in its first dtype.

    pytest-benchmark's own column is wall-clock time with the host in it; the figures in `extra_info`
    (and in the saved JSON) are medians of GPU time with a cold L2, for the op and its peers alike.
    """
    if not torch.cuda.is_available():
        pytest.skip("timings need a GPU")
    benchmark = request.getfixturevalue("benchmark")

    def check_and_time(case: Case) -> None:
        inputs = case.inputs(Inputs("cuda", case.dtypes[0]))
        check(case, inputs)
        seconds = median(case.run, inputs)
        peers = {name: median(peer, inputs) for name, peer in case.peers.items()}
        benchmark.extra_info.update(figures(case, seconds, peers))
        benchmark.pedantic(synchronized(case.run), inputs, rounds=20, warmup_rounds=3)

    return check_and_time


def check(case: Case, inputs: tuple[Any, ...]) -> None:
    """Fail unless `run` gives what `reference` gives, in what it returns and what it writes to."""
    like = tree_map_only(Tensor, Tensor.clone, inputs)
    actual, expected = case.run(*inputs), case.reference(*like)
    pairs = zip(tensors([actual, inputs]), tensors([expected, like]), strict=True)
    for position, (a, e) in enumerate(pairs):
        assert a.shape == e.shape and a.dtype == e.dtype
        if a.dtype.is_floating_point:
            error = (a.float() - e.float()).norm() / e.float().norm().clamp(min=1e-30)
            assert error <= TOLERANCE, f"{case}: tensor {position} is off by {error:.2%}"
        else:
            wrong = (a != e).float().mean()
            assert wrong <= TOLERANCE, f"{case}: {wrong:.2%} of tensor {position} differ"


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def median(run: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """GPU seconds of `run(*inputs)`, L2 flushed before each call."""
    return triton.testing.do_bench(lambda: run(*inputs), return_mode="median") / 1000


def synchronized(run: Callable[..., Any]) -> Callable[..., None]:
    def call(*inputs: Any) -> None:
        run(*inputs)
        torch.cuda.synchronize()

    return call


def figures(case: Case, seconds: float, peers: dict[str, float]) -> dict[str, str | float]:
    """What a reader of the saved results needs to judge them."""
    dtype = case.dtypes[0]
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "us": round(seconds * 1e6, 2),
        "GB/s": round(case.bytes(dtype.itemsize) / seconds / 1e9, 1),
        "TFLOP/s": round(case.flops / seconds / 1e12, 1),
        **{f"{name} us": round(peer * 1e6, 2) for name, peer in peers.items()},
        **{f"times as fast as {name}": round(peer / seconds, 3) for name, peer in peers.items()},
    }
