"""Golden vectors of bitsandbytes 0.50 on a CPU: `Params4bit` and `Int8Params` quantize and dequantize.

python tests/quant/golden/make_bitsandbytes.py
"""

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as F
from save import Golden


def weight(n, k, dtype):
    w = torch.randn(n, k) * torch.logspace(-2, 0, n)[:, None]
    w[1] = 0
    return w.to(dtype)


def config(eight):
    return {"quant_method": "bitsandbytes", "load_in_4bit": not eight, "load_in_8bit": eight}


def four(golden, case, n, k, kind, nested, dtype, blocksize=64):
    linear = bnb.nn.Linear4bit(k, n, bias=False, compress_statistics=nested, quant_type=kind)
    linear.weight = bnb.nn.Params4bit(
        weight(n, k, dtype), requires_grad=False, compress_statistics=nested, quant_type=kind,
        blocksize=blocksize,
    )  # fmt: skip
    linear = linear.to("cpu")
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    how = linear.weight.quant_state
    how.shape = torch.Size(
        [n * k]
    )  # in two dimensions its CPU code loses count where blocks cross rows
    reference = F.dequantize_4bit(linear.weight.data, how).view(n, k)
    golden.add(case, state, reference, config(False))


def eight(golden, case, n, k):
    linear = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
    linear.weight = bnb.nn.Int8Params(
        weight(n, k, torch.float16), has_fp16_weights=False, requires_grad=False
    )
    linear = linear.to("cpu")
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    reference = state["weight"].float() * (state["SCB"][:, None] / 127)
    golden.add(case, state, reference, config(True))


def main():
    torch.manual_seed(0)
    golden = Golden(__file__, {"bitsandbytes": bnb.__version__, "torch": torch.__version__})
    for kind in ("nf4", "fp4"):
        four(golden, f"{kind}", 32, 128, kind, False, torch.bfloat16)
        four(golden, f"{kind}_nested", 48, 448, kind, True, torch.bfloat16)  # 7 blocks a row
    four(golden, "nf4_float32", 8, 128, "nf4", True, torch.float32)
    four(golden, "nf4_128", 8, 256, "nf4", False, torch.float16, 128)
    four(
        golden, "nf4_crossing", 7, 96, "nf4", False, torch.bfloat16
    )  # blocks cross rows, the last is short
    four(golden, "nf4_crossing_nested", 7, 96, "nf4", True, torch.bfloat16)
    eight(golden, "int8", 32, 128)
    golden.save()


main()
