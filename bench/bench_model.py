"""A whole model of real size: tlk against transformers, in one process, on random weights.

    python bench/bench_model.py --out bench/results/h200.jsonl

Prefill of one sequence and generation at batch 1, for transformers as it comes (SDPA), with its
static cache and torch.compile, and optimized by tlk; beside them what the GPU can do, measured in
the same run: copy bandwidth for decode, which must read every weight once a token, and the rate of
a 4096³ matmul for prefill. Appends one line of JSON to --out.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from transformers import LlamaConfig, LlamaForCausalLM

import tlk

SHAPES = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
}


def seconds(run: Callable[[], Any], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median, least and most seconds of `run`, the device waited for."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def ceilings() -> dict[str, float]:
    """Bytes/s of a copy of 4 GiB (read + written), and FLOP/s of a bf16 matmul."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), 10)["median"]
    a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(20):
            a @ b

    matmul = seconds(products, 5)["median"] / 20
    return {"copy_bytes_per_s": 2 * source.nbytes / copy, "matmul_flops": 2 * 4096**3 / matmul}


def build(shape: str) -> LlamaForCausalLM:
    """A model with random bf16 weights on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.dtype = torch.bfloat16
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def prefill(model: Any, tokens: int) -> dict[str, float]:
    """One forward over `tokens` tokens, logits of the last."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
    return seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), 7, warmup=2)


def generate(model: Any, prompt: int, new: int, repeats: int, **kwargs: Any) -> dict[str, float]:
    """Greedy generation at batch 1, prefill included."""
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device="cuda")
    mask = torch.ones_like(ids)

    def run() -> None:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **kwargs
        )
        assert out.shape[1] == prompt + new

    return seconds(run, repeats)


def memory() -> dict[str, int]:
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "peak": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--commit", help="what was measured, for the record")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    limits = ceilings()
    torch.cuda.empty_cache()
    model = build(args.shape)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = model.lm_head.weight.numel()
    row: dict[str, Any] = {
        "benchmark": "model",
        "shape": args.shape,
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "tlk": tlk.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "commit": args.commit,
        "ceilings": limits,
        "prefill_tokens": args.prefill,
        "prefill_linear_flops": 2 * args.prefill * (linear - head),
        "decode_bytes_per_token": 2 * linear,
        "prompt": args.prompt,
        "new": args.new,
        "runs": {},
    }
    runs = row["runs"]
    runs["transformers eager"] = {
        "prefill_s": prefill(model, args.prefill),
        "generate_s": generate(model, args.prompt, args.new, 1),
    }
    runs["transformers static + compile"] = {
        "generate_s": generate(model, args.prompt, args.new, 3, cache_implementation="static")
    }
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, start = memory(), time.perf_counter()
    tlk.optimize(model, strict=True)
    torch.cuda.synchronize()
    row["optimize"] = {"seconds": time.perf_counter() - start, "before": before, "after": memory()}
    runs["tlk"] = {
        "prefill_s": prefill(model, args.prefill),
        "generate_s": generate(model, args.prompt, args.new, 3),
    }
    row["report"] = tlk.report(model).to_dict()
    show(row)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def show(row: dict[str, Any]) -> None:
    """Print the figures with their share of the ceilings."""
    limits = row["ceilings"]
    rate, flops = limits["copy_bytes_per_s"], limits["matmul_flops"]
    print(
        f"{row['gpu']}: copy {rate / 1e12:.2f} TB/s, bf16 matmul 4096³ {flops / 1e12:.0f} TFLOP/s"
    )
    for name, run in row["runs"].items():
        tokens = row["new"] / run["generate_s"]["median"]
        share = tokens * row["decode_bytes_per_token"] / rate
        line = f"{name:32s} {tokens:7.1f} tok/s ({share:.1%} of copy bandwidth)"
        if "prefill_s" in run:
            median = run["prefill_s"]["median"]
            done = row["prefill_linear_flops"] / median
            line += (
                f", prefill {1000 * median:.1f} ms = {done / 1e12:.0f} TFLOP/s ({done / flops:.1%})"
            )
        print(line)
    o = row["optimize"]
    extra = (o["after"]["peak"] - o["before"]["allocated"]) / 2**30
    reserved = (o["after"]["reserved"] - o["before"]["reserved"]) / 2**30
    print(
        f"optimize: {o['seconds']:.1f} s, {extra:.2f} GiB at its peak, {reserved:.2f} GiB more reserved after"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    main()
