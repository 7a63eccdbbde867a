"""Make gptq_rounding.safetensors: what GPTQModel's `GPTQ` class rounds weights to, for tests/quant/test_gptq.py.

    python -m venv /tmp/oracle && /tmp/oracle/bin/pip install --no-deps gptqmodel==7.7.0 and what it imports:
    pypcre tokenicer device-smi logbar defuser threadpoolctl requests dill ninja protobuf pillow
    GPTQMODEL_DISABLE_PACK_EXT=1 /tmp/oracle/bin/python tests/quant/golden/make_gptq_rounding.py

Runs on a CPU. The inputs are small integers, so that their Hessian is the same however it is summed.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import save_file
from torch import Tensor

N, K, TOKENS = 12, 192, 320
CASES = {
    "sym-g64": {"bits": 4, "group_size": 64, "sym": True},
    "asym-g64": {"bits": 4, "group_size": 64, "sym": False},
    "sym-row": {"bits": 4, "group_size": -1, "sym": True},
    "asym-3bit-g96": {"bits": 3, "group_size": 96, "sym": False},
    "sym-8bit-row": {"bits": 8, "group_size": -1, "sym": True},
}
DAMPING = 0.05


def inputs() -> tuple[Tensor, Tensor]:
    """A weight [N, K] and correlated integer inputs [TOKENS, K], one of which is always 0."""
    g = torch.Generator().manual_seed(7)
    x = torch.randint(-3, 4, (TOKENS, K), generator=g)
    x[:, 1:] += x[:, :-1]
    x[:, ::5] += 2 * x[:, 7:8]
    x[:, 50] = 0
    return torch.randn(N, K, generator=g) * (0.02 + 0.1 * torch.rand(N, 1, generator=g)), x.to(
        torch.int8
    )


def rounded(weight: Tensor, x: Tensor, bits: int, group_size: int, sym: bool) -> Tensor:
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = weight.clone()
    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=False, act_group_aware=False,
        damp_percent=DAMPING,
    )  # fmt: skip
    job = GPTQ(linear, config)
    job.quantizer.configure(perchannel=True)
    job.add_batch(x.float()[None], None)
    return job.quantize()[0].float().contiguous()


def main() -> None:
    here = Path(__file__)
    weight, x = inputs()
    tensors = {"weight": weight, "x": x}
    for name, options in CASES.items():
        tensors[name] = rounded(weight, x, **options)
    digest = hashlib.sha256(here.read_bytes()).hexdigest()
    about = {
        "versions": json.dumps({"gptqmodel": version("gptqmodel")}),
        "script": digest,
        "cases": "{}",
    }
    save_file(tensors, here.with_name("gptq_rounding.safetensors"), metadata=about)


if __name__ == "__main__":
    main()
