"""Make awq_search.safetensors: the scales that AutoAWQ chooses for a tiny Llama layer, for tests/quantize/test_scales.py.

    python -m venv /tmp/oracle, with torch and transformers, and in it
    pip install wheel; pip install --no-deps --no-build-isolation autoawq==0.2.9
    pip install --no-deps datasets zstandard multiprocess dill pandas pyarrow xxhash
    /tmp/oracle/bin/python tests/quant/golden/make_awq_search.py

Runs on a CPU, in float32. Each search of `AwqQuantizer` sees the unquantized layer, as it does in AutoAWQ.
"""

import hashlib
import json
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
from awq.quantize.quantizer import AwqQuantizer  # noqa: E402

GROUP, TOKENS, SEQUENCES = 32, 48, 2
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def model() -> LlamaForCausalLM:
    """A random layer some of whose inputs are much larger than others, as in trained models."""
    g = torch.Generator().manual_seed(3)
    made = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
            if "layernorm" in name:
                p.copy_(1 + 6 * torch.rand(p.shape, generator=g) ** 6)
            if "up_proj" in name or "v_proj" in name:
                p.mul_(1 + 4 * torch.rand(len(p), 1, generator=g) ** 6)
    return made


def quantizer() -> AwqQuantizer:
    made = AwqQuantizer.__new__(AwqQuantizer)
    made.w_bit, made.group_size, made.zero_point, made.duo_scaling = 4, GROUP, True, True
    made.n_parallel_calib_samples, made.max_chunk_memory = None, 2**30
    return made


@torch.no_grad()
def main() -> None:
    here, llama = Path(__file__), model()
    layer = llama.model.layers[0]
    g = torch.Generator().manual_seed(4)
    x = torch.randn(SEQUENCES, TOKENS, CONFIG["hidden_size"], generator=g)
    rotary = llama.model.rotary_emb(x, torch.arange(TOKENS)[None])
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    kwargs = {"position_embeddings": rotary, "attention_mask": mask}
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0]))
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    layer(x, **kwargs)
    for hook in hooks:
        hook.remove()
    a, m = layer.self_attn, layer.mlp
    tensors = {"x": x} | {f"model.layers.0.{k}": v.clone() for k, v in layer.state_dict().items()}
    for name, before, after, inspected, extra in (
        ("qkv", layer.input_layernorm, [a.q_proj, a.k_proj, a.v_proj], a, kwargs),
        ("out", a.v_proj, [a.o_proj], None, {}),
        ("gate_up", layer.post_attention_layernorm, [m.gate_proj, m.up_proj], m, {}),
        ("down", m.up_proj, [m.down_proj], None, {}),
    ):
        first = next(k for k, v in layer.named_modules() if v is after[0])
        keep = {k: v.clone() for k, v in layer.state_dict().items()}
        found = quantizer()._search_best_scale(
            layer, before, after, seen[first], inspected, dict(extra)
        )
        layer.load_state_dict(keep)
        tensors[f"scale.{name}"] = found[2].float().clone()
    digest = hashlib.sha256(here.read_bytes()).hexdigest()
    about = {
        "versions": json.dumps({"autoawq": version("autoawq")}),
        "script": digest,
        "cases": "{}",
    }
    file = here.with_name("awq_search.safetensors")
    save_file(tensors, file, metadata=about)
    file.chmod(0o644)


if __name__ == "__main__":
    main()
