"""Save a quantized model as a checkpoint of a standard layout, whole or not at all.

The layers come one at a time and go out in shards, so that one shard is in memory. All is written into
a folder beside the wanted one, which gets its name when everything is there: what fails leaves nothing.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tlk.hf.checkpoint import INDEX, SINGLE
from tlk.hf.hub import QUANTIZATION, SMALL
from tlk.quant.files.writers import WRITERS, Saved, ScaleError, choose, layer_tensors
from tlk.quant.format import Format, Packed

SHARD = 5 * 10**9
"""Bytes of one file, as transformers has them."""
REPORT = "tlk_quant.json"
OTHERS = (
    "config.json",
    INDEX,
    REPORT,
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)
"""Small files of the source that say how its own weights are stored."""


@dataclass(frozen=True)
class QuantizedModel:
    """What is to be saved.

    fields: of the source's config.json. formats: of every quantized layer, by the checkpoint's module
    names. shapes: theirs, [outputs, inputs]. layers: gives, each time it is called, all of them with
    their packed tensors. dense: gives every other tensor by its key. linears: all linear layers,
    quantized or not. dtype: the model's. kv_scales: of the cache, by the checkpoint's attention
    modules, k and v float32 [Hk]; kv_dtype "fp8" or "int8" if there are any.
    """

    fields: Mapping[str, Any]
    formats: Mapping[str, Format]
    shapes: Mapping[str, tuple[int, int]]
    layers: Callable[[], Iterable[tuple[str, Packed]]]
    dense: Callable[[], Iterable[tuple[str, Tensor]]]
    linears: Sequence[str]
    dtype: torch.dtype
    kv_scales: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kv_dtype: str | None = None


def save_quantized(
    model: QuantizedModel,
    out: Path,
    *,
    format: str | None = None,
    report: Mapping[str, Any] | None = None,
    source: Path | None = None,
    shard: int = SHARD,
) -> str:
    """Write `model` to the new folder `out`; returns the layout's name.

    format: "compressed-tensors" (or "ct"), "awq", "gptq", "bitsandbytes" or "fp8"; None is what most
    loaders read. report: what tlk_quant.json holds. source: the folder whose tokenizer and other small
    files are copied. shard: bytes of one file. AWQ and GPTQ store scales in float16: where that does
    not hold one, the default falls back to compressed-tensors.
    Raises FileExistsError if `out` exists, ValueError for an unknown format, UnsupportedError for
    layers that it cannot hold.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: give a folder that is not")
    if not model.formats:
        raise ValueError("formats must name at least one quantized layer, got none")
    name = choose(model.formats, model.shapes, format)
    try:
        _write(model, out, name, report, source, shard)
    except ScaleError:
        if format is not None:
            raise
        name = "compressed-tensors"
        _write(model, out, name, report, source, shard)
    return name


def _write(
    model: QuantizedModel,
    out: Path,
    name: str,
    report: Mapping[str, Any] | None,
    source: Path | None,
    shard: int,
) -> None:
    with _whole(out) as folder:
        _write_shards(folder, _tensors(model, name), shard)
        kept = [module for module in model.linears if module not in model.formats]
        saved = Saved(model.formats, kept, model.dtype, model.kv_dtype)
        fields = {key: v for key, v in model.fields.items() if key not in QUANTIZATION}
        fields["quantization_config"] = WRITERS[name].config(saved)
        _write_json(folder / "config.json", fields)
        if report is not None:
            _write_json(folder / REPORT, {**report, "format": name})
        for file in _small_files(source):
            shutil.copyfile(file, folder / file.name)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` when the block ends, and is gone if it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        if folder.exists():
            shutil.rmtree(folder)


def _tensors(model: QuantizedModel, name: str) -> Iterator[tuple[str, Tensor]]:
    """Everything that goes into the files, by key."""
    missing = set(model.formats)
    for module, packed in model.layers():
        missing.discard(module)
        yield from layer_tensors(name, module, model.formats[module], packed, model.dtype).items()
    if missing:
        raise ValueError(f"layers must give all that formats names, it lacks {sorted(missing)}")
    yield from model.dense()
    # what has no field for the cache's dtype is read as fp8's: 127 of int8 are 448 of those
    factor = 127 / 448 if model.kv_dtype == "int8" and name != "compressed-tensors" else 1.0
    for attention, scales in model.kv_scales.items():
        for which, scale in zip("kv", scales, strict=True):
            yield f"{attention}.{which}_scale", (scale * factor).to(model.dtype).view(-1, 1, 1)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Files of at most `limit` bytes (or one tensor), and their index if they are several."""
    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        metadata = {"format": "pt"}
        save_file(shard, folder / _unnumbered(len(files)), metadata=metadata)
        files.append(list(shard))
        shard, size = {}, 0

    for key, tensor in tensors:
        # a copy where it is a view: a file must not hold what lies around it
        own = tensor.detach().cpu().contiguous()
        bytes_ = own.numel() * own.element_size()
        if shard and size + bytes_ > limit:
            flush()
        alone = all(own.data_ptr() != other.data_ptr() for other in shard.values())
        if own.untyped_storage().nbytes() != bytes_ or not alone:
            own = own.clone()
        shard[key] = own
        size, total = size + bytes_, total + bytes_
    flush()
    _name_shards(folder, files, total)


def _unnumbered(i: int) -> str:
    return f"shard-{i}.unfinished"


def _name_shards(folder: Path, files: list[list[str]], total: int) -> None:
    if len(files) == 1:
        (folder / _unnumbered(0)).rename(folder / SINGLE)
        return
    where: dict[str, str] = {}
    for i, keys in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (folder / _unnumbered(i)).rename(folder / name)
        where |= dict.fromkeys(keys, name)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _small_files(source: Path | None) -> list[Path]:
    if source is None:
        return []
    found = {file for pattern in SMALL for file in source.glob(pattern)}
    return sorted(file for file in found if file.name not in OTHERS and file.is_file())


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
