"""Golden vectors of AutoAWQ 0.2.9: `WQLinear_GEMM` packs, `dequantize_gemm` is its arithmetic.

python -W ignore tests/quant/golden/make_autoawq.py
"""

import awq
import torch
from awq.modules.linear import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from save import Golden

N, K = 64, 128


def pack(golden, case, group_size):
    groups = K // group_size
    codes, zero = torch.randint(16, (N, K)), torch.randint(16, (N, groups)).float()
    zero[:8, 0] = torch.tensor([0.0, 15, 0, 1, 15, 0, 0, 15])
    scale = (torch.rand(N, groups) * 0.02 + 0.001).half()
    index = torch.arange(K) // group_size
    linear = torch.nn.Linear(K, N, bias=False).half()
    linear.weight.data = ((codes - zero[:, index]) * scale.float()[:, index]).half()
    module = WQLinear_GEMM.from_linear(linear, 4, group_size, scales=scale.T, zeros=zero.T)
    reference = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, group_size).T
    exact = (codes - zero[:, index]) * scale.float()[:, index]
    assert torch.equal(reference, exact.half())
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
    }
    state = {k: v for k, v in module.state_dict().items() if k in ("qweight", "qzeros", "scales")}
    golden.add(case, state, reference, config)


def main():
    torch.manual_seed(0)
    golden = Golden(__file__, {"autoawq": awq.__version__, "torch": torch.__version__})
    pack(golden, "group32", 32)
    pack(golden, "group128", 128)
    golden.save()


main()
