import pytest
import torch

from tests.bench.tuning import BF16
from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import Projection
from tlk.bench.tune_prune import spelled
from tlk.kernels.aot import GPUS
from tlk.kernels.tunable import TUNABLE


@pytest.mark.parametrize("op", TUNABLE)
@pytest.mark.parametrize("running", [1, 3, 16, 64, 300])
@pytest.mark.parametrize("arch", GPUS)
def test_search_spaces_are_small_distinct_and_know_the_library(op, running, arch):
    call = TUNABLE[op].candidates
    own = CALLS[op].dtype
    for dtype in (own,) if own else (torch.float16, torch.float32):
        dims = CALLS[op].dims(Projection(28672, 4096, norm=True, gated=True))
        configs = call(arch, GPUS[arch].sm_count, dtype, dims, running)
        assert len({spelled(c) for c in configs}) == len(configs) < 120
        if not configs:  # codes need tensor cores
            assert op.startswith("dequant_mm") and (arch < 80 or dtype == torch.float32)
            continue
        if own is None:
            assert configs[-1]["backend"] in ("cublas", "unfused", "separate")
        kernels = {c.get("kernel") for c in configs}
        if arch < 80 or dtype == torch.float32:
            assert (
                kernels and "dot" not in kernels
            )  # below sm_80 no tensor cores, and none of float32
        if running > 64:
            assert not kernels & {"gemv", "fma", "dot"}
        if running == 1 and not op.startswith(("dequant_mm", "scaled_mm")):
            assert "gemv" in kernels


def test_rows_too_long_for_registers_and_gates_of_one_row_are_no_candidates():
    def kernels(op, dims):
        return [c for c in TUNABLE[op].candidates(90, 132, BF16, dims, 1) if "kernel" in c]

    assert {c["kernel"] for c in kernels("matmul", (4096, 16385))} == {"fma"}
    assert {c["kernel"] for c in kernels("matmul", (4096, 16384))} == {"gemv"}
    assert min(c["meta"]["BLOCK_N"] for c in kernels("gated_linear", (4096, 8192))) == 2
    assert min(c["meta"]["BLOCK_N"] for c in kernels("matmul", (4096, 8192))) == 1
