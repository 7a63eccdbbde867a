"""Golden vectors of GPTQModel 7.7: `TorchLinear` packs, converts between versions and dequantizes.

GPTQMODEL_DISABLE_PACK_EXT=1 python tests/quant/golden/make_gptqmodel.py
"""

import gptqmodel
import torch
from gptqmodel import BACKEND, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from save import Golden

N, K = 32, 128


def on_grid(bits, groups, g_idx, sym, extremes):
    """A weight exactly on the grid of its scales and zero points, so that packing loses nothing."""
    top = 2**bits - 1
    codes = torch.randint(top + 1, (N, K))
    scale = (torch.rand(N, groups) * 0.02 + 0.001).half().float()
    zero = (
        torch.full((N, groups), 2.0 ** (bits - 1))
        if sym
        else torch.randint(top + 1, (N, groups)).float()
    )
    if extremes:
        zero[:8, 0] = torch.tensor([0.0, top, 0, 1, top, 0, 0, top])
    weight = (codes - zero[:, g_idx]) * scale[:, g_idx]
    return weight, scale, zero


def pack(
    golden, case, bits, group_size, sym, version, act_order=False, extremes=False, tolerance=2e-3
):
    groups = 1 if group_size == -1 else K // group_size
    g_idx = torch.arange(K) // (K // groups)
    if act_order:
        g_idx = g_idx[torch.randperm(K)]
    weight, scale, zero = on_grid(bits, groups, g_idx, sym, extremes)
    module = TorchLinear(
        bits=bits,
        group_size=group_size,
        desc_act=act_order,
        sym=sym,
        in_features=K,
        out_features=N,
        bias=False,
        pack_dtype=torch.int32,
        backend=BACKEND.TORCH,
        adapter=None,
        register_buffers=True,
    )
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = weight
    module.pack_block(linear, scale.clone(), zero.clone(), g_idx.to(torch.int32))
    reference = module.dequantize_weight().T.float()
    assert (reference - weight).abs().max() < tolerance * weight.abs().max()
    if version == 1:
        config = QuantizeConfig(bits=bits, group_size=group_size, sym=sym, desc_act=act_order)
        convert_gptq_v2_to_v1_format_module(module, config)
    state = {
        k: v
        for k, v in module.state_dict().items()
        if k in ("qweight", "qzeros", "scales", "g_idx")
    }
    fields = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    golden.add(case, state, weight, fields)  # the grid itself; GPTQModel multiplies in float16


def main():
    torch.manual_seed(0)
    golden = Golden(__file__, {"gptqmodel": gptqmodel.__version__, "torch": torch.__version__})
    for bits in (2, 3, 4, 8):
        pack(golden, f"sym_v1_{bits}bit", bits, 32, True, 1)
        pack(golden, f"asym_v2_{bits}bit", bits, 32, False, 2)
    pack(golden, "sym_v2", 4, 64, True, 2)
    pack(golden, "asym_v1_extremes", 4, 32, False, 1, extremes=True)
    pack(golden, "asym_v1_extremes_8bit", 8, 32, False, 1, extremes=True)
    pack(golden, "asym_v1_extremes_2bit", 2, 32, False, 1, extremes=True)
    pack(golden, "channel", 4, -1, True, 1)
    pack(golden, "act_order", 4, 32, True, 1, act_order=True)
    pack(golden, "act_order_asym_v2", 4, 64, False, 2, act_order=True)
    golden.save()


main()
