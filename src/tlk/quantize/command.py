"""What `tlk quantize` asks for and tells."""

import argparse
from pathlib import Path
from typing import Any

from tlk.quant.config import METHODS
from tlk.quantize.calibration import LENGTH, SAMPLES
from tlk.quantize.checkpoint import quantize
from tlk.quantize.run import KV_DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("out", type=Path, help="the folder to write, which must not be there yet")
    add_method(parser, required=True)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="rows of calibration data")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument(
        "--ignore",
        nargs="*",
        metavar="MODULE",
        help='modules or "re:…" to leave in 16 bit (lm_head)',
    )
    parser.add_argument(
        "--format", choices=("compressed-tensors", "awq", "gptq", "bitsandbytes", "fp8"),
        help="of the checkpoint, where there is a choice",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache-dtype", choices=tuple(KV_DTYPES), help="find scales for a cache of 8 bits too"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--strict", action="store_true", help="fail where a layer must stay in 16 bit"
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="begin anew where an earlier run was stopped"
    )


def add_method(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The arguments that say how to quantize, for every command that can."""
    option = "--method" if required else "--quantization"
    parser.add_argument(option, choices=tuple(METHODS), required=required, help="how to quantize")
    parser.add_argument(
        "--calibration", metavar="FILE", help='JSONL: a text a line, or objects with a "text"'
    )
    parser.add_argument("--group-size", type=int, help="inputs that share a scale: 32, 64 or 128")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--symmetric", action="store_true", default=None, help="without zero points")
    kinds.add_argument(
        "--zero-points", action="store_false", dest="symmetric", help="with zero points"
    )
    parser.add_argument(
        "--double-quant", action="store_true", default=None, help="scales of nf4 and fp4 in 8 bits"
    )
    parser.add_argument(
        "--static", action="store_true", default=None, help="one scale for all inputs of a layer"
    )


def run(model: str, out: Path, *, no_resume: bool, **options: Any) -> int:
    """Quantize, and print what became of the model."""
    report = quantize(model, out, resume=not no_resume, **options)
    print(summary(report, out))
    return 0


def summary(report: dict[str, Any], out: Path) -> str:
    """A few lines of what `quantize` returned."""
    layers: dict[str, dict[str, Any]] = report["layers"]
    key = "output_error" if report["calibration"] else "weight_error"
    errors = {name: layer[key] for name, layer in layers.items()}
    worst = max(errors, key=lambda name: errors[name])
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    lines = [
        f"{out}: {len(layers)} layers in {report['method']}, stored as {report['format']}, "
        f"{size / 2**20:.1f} MiB",
        f"  {report['seconds']:.1f} s on {report['device']}, at most "
        f"{report['memory_bytes'] / 2**30:.1f} GiB of memory",
        f"  relative {key.replace('_', ' ')}: mean {sum(errors.values()) / len(errors):.4f}, "
        f"worst {errors[worst]:.4f} ({worst})",
    ]
    if report["calibration"]:
        lines.append(f"  calibrated on {report['calibration']}")
    lines += [f"  {name} stays in 16 bit: {why}" for name, why in report["kept_in_16_bit"].items()]
    lines += [f"  {name}: {layers[name]['fallback']}" for name in report["fallbacks"]]
    return "\n".join(lines)
