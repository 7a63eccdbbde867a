"""The command `tlk`: parses, calls, prints; `tlk.demo`, `tlk.bench` and `tlk.doctor` do the work."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tlk import __version__, doctor
from tlk.bench import command, kernel_command, tune
from tlk.bench.serving import Kind
from tlk.demo import compare, corpus, generate
from tlk.errors import TlkError
from tlk.hf.weights import DTYPES
from tlk.optimize import optimize
from tlk.quant.config import QuantConfig
from tlk.quantize import command as quantize_command
from tlk.quantize.calibration import read_calibration
from tlk.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`; returns 0 if it succeeded, 1 if not, 2 if it was asked wrongly."""
    arguments = _parser().parse_args(argv)
    run = arguments.run
    del arguments.run
    try:
        return int(run(**vars(arguments)))
    except (TlkError, OSError) as error:
        status, message = 1, str(error)
    except ValueError as error:
        status, message = 2, str(error)
    print("tlk:", " ".join(message.split()), file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tlk", description="Hugging Face models on Triton kernels, without leaving PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"tlk {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser("demo", help="generate with transformers and with tlk, side by side")
    demo.add_argument("--prompt", default=compare.PROMPT, help="the text to continue")
    demo.add_argument("--model", default=str(generate.EMBEDDED), help="a folder or a hub id")
    demo.add_argument("--max-new-tokens", type=int, default=64)
    demo.add_argument(
        "--json", type=Path, dest="json_file", metavar="FILE", help="write the results there too"
    )
    _add_place(demo, "float32")
    demo.set_defaults(run=_demo)

    text = commands.add_parser("generate", help="continue a prompt, streaming")
    text.add_argument("model", help="a folder or a hub id")
    text.add_argument("prompt", help="the text to continue")
    text.add_argument("--max-new-tokens", type=int, default=128)
    text.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    text.add_argument("--top-p", type=float, default=1.0, help="1: all tokens")
    text.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    text.add_argument("--seed", type=int, default=0)
    _add_place(text, "auto")
    text.set_defaults(run=_generate)

    check = commands.add_parser("verify", help="compare tlk's logits with transformers' own")
    check.add_argument("model", help="a folder or a hub id")
    quantize_command.add_method(check, required=False)
    check.add_argument(
        "--text",
        metavar="FILE",
        help="JSONL to judge by; the source of Python's library without it",
    )
    _add_place(check, "auto")
    check.set_defaults(run=_verify)

    quantizing = commands.add_parser("quantize", help="write a checkpoint in 4 or 8 bits")
    quantize_command.add_arguments(quantizing)
    quantizing.set_defaults(run=quantize_command.run)

    bench = commands.add_parser("bench", help="measure kernels and the engine, beside their limits")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)
    helps: dict[Kind, str] = {"throughput": "all prompts at once", "latency": "a batch at a time"}
    for kind, meaning in helps.items():
        what = kinds.add_parser(kind, help=meaning)
        command.add_arguments(what, kind)
        _add_place(what, "auto")
        what.set_defaults(run=partial(command.run, kind))
    ops = kinds.add_parser("kernels", help="each kernel, beside other packages' and its ceiling")
    kernel_command.add_arguments(ops)
    ops.set_defaults(run=kernel_command.run)

    tuning = commands.add_parser("tune", help="measure which configurations are fastest here")
    tune.add_arguments(tuning)
    tuning.set_defaults(run=tune.run)

    machine = commands.add_parser("doctor", help="is this machine ready, and if not, what to do")
    machine.set_defaults(run=_doctor)
    return parser


def _add_place(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default=dtype)


def _demo(
    model: str, prompt: str, max_new_tokens: int, json_file: Path | None, device: str, dtype: str
) -> int:
    result = compare.compare(
        model, prompt, max_new_tokens=max_new_tokens, device=device, dtype=dtype
    )
    print(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return 0 if result.matched else 1


def _generate(model: str, prompt: str, **options: object) -> int:
    generate.stream(model, prompt, **options)  # type: ignore[arg-type]
    return 0


def _verify(
    model: str, quantization: str | None, calibration: str | None, text: str | None,
    device: str, dtype: str, **options: Any,
) -> int:  # fmt: skip
    given = {n: v for n, v in {**options, "calibration": calibration}.items() if v is not None}
    if quantization is None and given:
        raise ValueError(f"--quantization must be given for {', '.join(given)}")
    config = None if quantization is None else QuantConfig(quantization, **given)
    loaded, tokenizer = generate.load(model, dtype, device)
    prompts = _prompts(loaded, tokenizer, text) if text or config else None
    print(verify(optimize(loaded, quantization=config), prompts))
    return 0


def _prompts(model: Any, tokenizer: Any, text: str | None) -> list[Tensor]:
    """Up to 8 rows of 512 tokens of a JSONL file, or of the held-out part of Python's library."""
    texts = text or corpus.texts(corpus.HELD_OUT).values()
    length = min(512, model.config.max_position_embeddings)
    rows = read_calibration(
        texts, lambda part: tokenizer(part, verbose=False)["input_ids"],
        vocab_size=model.config.vocab_size, samples=8, length=length,
    )  # fmt: skip
    return list(rows.ids)


def _doctor() -> int:
    checks = doctor.check()
    print(*checks, sep="\n")
    return 0 if doctor.usable(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
