"""The command lines of `tlk bench`: what `ServingOptions` holds, as flags."""

import argparse
from pathlib import Path
from typing import Any

from tlk.bench.serving import Kind, ServingOptions, measure, show, write
from tlk.bench.shapes import SHAPES
from tlk.bench.step_profile import table

FLAGS: dict[str, tuple[type, str]] = {
    "input_len": (int, "tokens of each prompt"),
    "output_len": (int, "tokens that each request draws"),
    "max_model_len": (int, "tokens of one sequence; all that the model can place, by default"),
    "max_num_seqs": (int, "sequences that run at once"),
    "max_num_batched_tokens": (int, "tokens of one step"),
    "gpu_memory_utilization": (float, "share of the GPU's memory to use"),
    "kv_cache_memory": (int, "bytes of the cache"),
    "quantization": (str, "of the weights, rounded to nearest: fp8, int8-weight, int4, nf4, …"),
    "kv_cache_dtype": (str, "of the cache: auto, fp8 or int8"),
    "temperature": (float, "0: the likeliest token"),
    "seed": (int, "of weights, prompts and draws"),
    "warmup": (int, "runs before those that count"),
    "repeats": (int, "runs that count"),
    "compare_prompts": (int, "the most prompts that transformers gets"),
}
SWITCHES = {
    "enforce_eager": "no CUDA graphs",
    "compile": "torch.compile of the decoder, inside the graphs",
    "deterministic": "results that do not depend on the batch",
    "profile": "time the kernels of some decode steps, by what they do",
}


def add_arguments(parser: argparse.ArgumentParser, kind: Kind) -> None:
    """Everything that `run` takes."""
    parser.add_argument("model", nargs="?", help="a folder or a hub id; or --random-weights")
    parser.add_argument(
        "--random-weights",
        metavar="CONFIG",
        help=f"weights made up in the shape of a config.json, its folder, or {', '.join(SHAPES)}",
    )
    if kind == "throughput":
        parser.add_argument("--num-prompts", type=int, default=128, help="all at once")
    else:
        parser.add_argument("--batch-size", type=int, default=1, help="prompts at a time")
    for name, (type_, text) in FLAGS.items():
        default = ServingOptions.__dataclass_fields__[name].default
        parser.add_argument(_flag(name), type=type_, default=default, help=text)
    for name, text in SWITCHES.items():
        parser.add_argument(_flag(name), action="store_true", help=text)
    parser.add_argument(
        "--compare", choices=("transformers",), help="measure it on the same weights, first"
    )
    parser.add_argument(
        "--json",
        type=Path,
        dest="json_file",
        metavar="FILE",
        help="write the record there too; one more line of a .jsonl file",
    )


def run(kind: Kind, json_file: Path | None = None, **options: Any) -> int:
    """Measure, print, and write the record where it is wanted."""
    record = measure(kind, ServingOptions(**options))
    print(show(record))
    if record["profile"] is not None:
        print(table(record["profile"]))
    if json_file is not None:
        write(record, json_file)
    return 0


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
