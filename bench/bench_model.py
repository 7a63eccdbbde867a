"""A whole model of real size: tlk against transformers, in one process, on random weights.

    python bench/bench_model.py --out bench/results/h200.jsonl

Prefill of one sequence and generation at batch 1, for transformers as it comes (SDPA), with its
static cache and torch.compile, and optimized by tlk; beside them what the GPU can do, measured in
the same run: copy bandwidth for decode, which must read every weight once a token, and the rate of
a 4096³ matmul for prefill. Appends one line of JSON to --out.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import tlk
from tlk.bench.ceilings import ceilings, machine, seconds
from tlk.bench.peers import random_model
from tlk.bench.shapes import SHAPES

DEVICE = torch.device("cuda")


@torch.no_grad()
def prefill(model: Any, tokens: int) -> dict[str, float]:
    """One forward over `tokens` tokens, logits of the last."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
    return seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), 7, DEVICE, warmup=2)


def generate(model: Any, prompt: int, new: int, repeats: int, **kwargs: Any) -> dict[str, float]:
    """Greedy generation at batch 1, prefill included."""
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device="cuda")
    mask = torch.ones_like(ids)

    def run() -> None:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **kwargs
        )
        assert out.shape[1] == prompt + new

    return seconds(run, repeats, DEVICE)


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
    limits = ceilings(DEVICE)
    torch.cuda.empty_cache()
    model = random_model(SHAPES[args.shape], torch.bfloat16, DEVICE, 0)
    model.generation_config.pad_token_id = 0
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = model.lm_head.weight.numel()
    row: dict[str, Any] = {
        "benchmark": "model",
        "shape": args.shape,
        **machine(DEVICE),
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
