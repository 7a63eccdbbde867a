"""Bits per byte of the embedded model in every quantization: `python bench/quality.py --device cuda`.

The held-out text is that of tlk.demo.corpus, the calibration data its training text, in an order drawn
anew for each seed. A method without calibration has one value and no error. Prints a table in Markdown
and writes all of it as JSON; exits with 1 if an order that should hold does not, and says which.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import triton
from torch import Tensor

import tlk
from tlk.demo import corpus
from tlk.demo.generate import EMBEDDED
from tlk.hf.checkpoint import load_tokenizer
from tlk.hf.weights import load_decoder
from tlk.models.decoder import Decoder
from tlk.models.families import FAMILIES, weight_sources
from tlk.quant.config import QuantConfig
from tlk.quantize.calibration import Calibration, read_calibration
from tlk.quantize.half import Attending
from tlk.quantize.plan import plan
from tlk.quantize.run import run


@dataclass(frozen=True)
class Row:
    """A line of the table. calibrated: it gets calibration data, new for each seed."""

    name: str
    config: QuantConfig
    calibrated: bool = False


ROWS = (
    Row("fp8", QuantConfig("fp8")),
    Row("fp8-block", QuantConfig("fp8-block")),
    Row("int8", QuantConfig("int8"), True),
    Row("int8-weight", QuantConfig("int8-weight")),
    Row("int4", QuantConfig("int4")),
    Row("int4, zero points", QuantConfig("int4", symmetric=False)),
    Row("int4-awq", QuantConfig("int4-awq"), True),
    Row("int4-awq, symmetric", QuantConfig("int4-awq", symmetric=True), True),
    Row("int4-gptq", QuantConfig("int4-gptq"), True),
    Row("nf4", QuantConfig("nf4")),
    Row("nf4, double", QuantConfig("nf4", double_quant=True)),
    Row("fp4 (bitsandbytes)", QuantConfig("fp4")),
    Row("fp4-nv", QuantConfig("fp4-nv")),
    Row("fp4-nv, calibrated", QuantConfig("fp4-nv"), True),
    Row("fp4-mx", QuantConfig("fp4-mx")),
    Row("fp4-mx, calibrated", QuantConfig("fp4-mx"), True),
)


class Model:
    """A decoder with the face of a transformers model, as far as corpus.held_out_bits_per_byte looks."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self.decoder, self.device = decoder, device
        self.runs: dict[int, Attending] = {}

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        sequences, length = input_ids.shape
        attending = self.runs.setdefault(length, Attending(length, self.device))
        self.decoder.prepare(length)
        x = self.decoder.embedding(input_ids.flatten())
        for layer in self.decoder.layers:
            x = layer(x, attending.batch(x, sequences), attending.kv(layer, x, sequences))
        logits = self.decoder.logits(x)
        return SimpleNamespace(logits=logits.view(sequences, length, -1))


def dtype_on(device: torch.device) -> torch.dtype:
    """What the model computes in: bfloat16 on a GPU; float32 on a CPU, which is slow in bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def bits(decoder: Decoder, tokenizer: Any, device: torch.device, part: int | None) -> float:
    """Held-out bits per byte."""
    model = Model(decoder, device)
    return corpus.held_out_bits_per_byte(model, tokenizer, bytes_per_module=part)


def data_of(seed: int, tokenizer: Any, samples: int, length: int) -> Calibration:
    """Rows of the training text, its modules in an order of the seed's own."""
    texts = list(corpus.texts(corpus.TRAINING).values())
    random.Random(seed).shuffle(texts)

    def encode(text: str) -> list[int]:
        return [0, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    return read_calibration(
        texts, encode, vocab_size=len(tokenizer), samples=samples, length=length
    )


def measure(
    row: Row, data: Calibration | None, tokenizer: Any, device: torch.device, part: int | None
) -> float:
    """Held-out bits per byte of the embedded model, quantized anew."""
    loaded = load_decoder(str(EMBEDDED), dtype=dtype_on(device), device=device, progress=False)
    sources = weight_sources(FAMILIES[loaded.family], loaded.decoder.config)
    planned = plan(loaded.decoder, sources, row.config, strict=True)
    run(loaded.decoder, planned, data, device, progress=False)
    return bits(loaded.decoder, tokenizer, device, part)


def results(
    rows: Sequence[Row], seeds: Sequence[int], samples: int, length: int, device: torch.device,
    part: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The values of all rows, and what they were measured with."""
    tokenizer = load_tokenizer(str(EMBEDDED))
    dense = load_decoder(str(EMBEDDED), dtype=dtype_on(device), device=device, progress=False)
    found = {"not quantized": [bits(dense.decoder, tokenizer, device, part)]}
    data = {seed: data_of(seed, tokenizer, samples, length) for seed in seeds}
    for row in rows:
        started = time.perf_counter()
        chosen = [data[seed] for seed in seeds] if row.calibrated else [None]
        found[row.name] = [measure(row, d, tokenizer, device, part) for d in chosen]
        seconds = time.perf_counter() - started
        print(f"{row.name}: {statistics.fmean(found[row.name]):.4f}, {seconds:.1f} s",
              file=sys.stderr, flush=True)  # fmt: skip
    cuda = device.type == "cuda"
    return {
        "bits_per_byte": found,
        "calibration": f"{samples} × {length} tokens of the training text",
        "seeds": list(seeds),
        "bytes_per_module": part,
        "held_out_sha256": {p: corpus.sha256(t) for p, t in corpus.texts(corpus.HELD_OUT).items()},
        "dtype": str(dtype_on(device)).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "versions": {
            "python": platform.python_version(),
            "tlk": tlk.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: a line a method, the best first, with the spread over seeds where there are several."""
    values = found["bits_per_byte"]
    (base,) = values["not quantized"]
    lines = ["| method | held-out bits per byte | change |", "|---|---|---|"]
    for name in sorted(values, key=lambda name: statistics.fmean(values[name])):
        mean = statistics.fmean(values[name])
        spread = f" ± {statistics.stdev(values[name]):.4f}" if len(values[name]) > 1 else ""
        lines.append(f"| {name} | {mean:.4f}{spread} | {mean / base - 1:+.2%} |")
    return "\n".join(lines)


def broken(values: dict[str, list[float]]) -> list[str]:
    """The orders that should hold and do not."""
    mean = {name: statistics.fmean(v) for name, v in values.items()}
    names = ("int8", "fp8", "fp8-block", "int8-weight")
    close = {
        f"{n} within 0.5 % of the model": mean[n] <= 1.005 * mean["not quantized"] for n in names
    }
    four = [n for n in mean if "4" in n and "fp4-mx" not in n]
    orders = {
        "int4-gptq better than int4": mean["int4-gptq"] < mean["int4"],
        "int4-awq better than int4": mean["int4-awq"] < mean["int4"],
        "int4-awq better than int4 with zero points": mean["int4-awq"] < mean["int4, zero points"],
        "nf4 better than fp4 (bitsandbytes)": mean["nf4"] < mean["fp4 (bitsandbytes)"],
        "fp4-mx worst": all(mean["fp4-mx"] > mean[n] for n in four),
    }
    return [name for name, holds in (close | orders).items() if not holds]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="bits per byte of the embedded model, quantized")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bytes-per-module", type=int, help="judge only the start of each module")
    parser.add_argument("--out", type=Path, help="a JSON file for all values")
    a = parser.parse_args(argv)
    found = results(
        ROWS, range(a.seeds), a.samples, a.length, torch.device(a.device), a.bytes_per_module
    )
    print(table(found))
    if a.out is not None:
        a.out.write_text(json.dumps(found, indent=2) + "\n")
    failures = broken(found["bits_per_byte"])
    print(*(f"does not hold: {name}" for name in failures), sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
