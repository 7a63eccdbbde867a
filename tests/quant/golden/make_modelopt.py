"""Golden vectors of NVIDIA ModelOpt 0.47: a tiny Llama quantized and exported by it, layer 0 of each.

python -W ignore tests/quant/golden/make_modelopt.py
"""

import json
import tempfile
from pathlib import Path

import modelopt
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor
from safetensors.torch import load_file
from save import Golden
from transformers import LlamaConfig, LlamaForCausalLM

LAYER = "model.layers.0."
NAMES = ("mlp.down_proj",)
"""A layer that shares its input with no other: the export leaves its scales alone."""
HIDDEN = 128


def tiny(intermediate):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=intermediate, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=64,
        dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def run(model):
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        model(torch.randint(64, (1, 32), generator=generator))


def dequantized(case, state, fake, shape):
    """By ModelOpt's own tensor classes; where it has none for a CPU, its quantizer's rounding before export."""
    if case.startswith("NVFP4"):
        tensor = NVFP4QTensor(torch.Size(shape), torch.float32, state["weight"])
        return tensor.dequantize(
            torch.float32, scale=state["weight_scale"], double_scale=state["weight_scale_2"],
            block_sizes={-1: 16},
        )  # fmt: skip
    if case == "MXFP4":
        tensor = MXFP4QTensor(torch.Size(shape), torch.float32, state["weight"])
        return tensor.dequantize(torch.float32, scale=state["weight_scale"], block_sizes={-1: 32})
    return fake


def export(golden, case, settings, names=NAMES, intermediate=128, **exactness):
    model = mtq.quantize(tiny(intermediate), settings, run)
    modules, fake = dict(model.named_modules()), {}
    for name in names:
        if case not in ("NVFP4", "MXFP4"):
            quantizer, weight = modules[LAYER + name].weight_quantizer, modules[LAYER + name].weight
            fake[name] = quantizer(weight.detach().float()).detach().clone()
    shapes = {name: list(modules[LAYER + name].weight.shape) for name in names}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        export_hf_checkpoint(model, export_dir=folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        config = json.loads((Path(folder) / "hf_quant_config.json").read_text())
    for name in names:
        key = f"{LAYER}{name}."
        state = {k.removeprefix(key): v for k, v in tensors.items() if k.startswith(key)}
        expected = dequantized(case, state, fake.get(name), shapes[name])
        golden.add(
            f"{case}.{name.rpartition('.')[2]}", state, expected.float(), config, **exactness
        )


def main():
    golden = Golden(__file__, {"modelopt": modelopt.__version__, "torch": torch.__version__})
    # the export divides in bfloat16 where the quantizer does in float32: now and then another code
    rounded = {"tolerance": 0.08, "share": 0.03}
    export(golden, "FP8", mtq.FP8_DEFAULT_CFG, **rounded)
    export(golden, "FP8_PER_CHANNEL_PER_TOKEN", mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, **rounded)
    for size in (128, 256):  # one block, whose scale is exported as a scalar, and two
        settings = mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG
        export(golden, f"FP8_PB_WO_{size}", settings, intermediate=size, tolerance=1e-6)
    export(golden, "NVFP4", mtq.NVFP4_DEFAULT_CFG, tolerance=1e-6)
    export(golden, "W4A16_AWQ", mtq.INT4_AWQ_CFG, tolerance=0.15, share=0.03)
    export(golden, "W8A8_SQ_PER_CHANNEL", mtq.INT8_SMOOTHQUANT_CFG, **rounded)
    export(golden, "MXFP4", mtq.MXFP4_DEFAULT_CFG)
    golden.save()


main()
