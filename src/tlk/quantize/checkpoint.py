"""From a checkpoint to a quantized one, with one layer in memory at a time.

Every layer that is done is kept in `OUT.partial`, so that a run that was stopped goes on where it
was: the layers before are stored again and the calibration data runs through them, which takes a
fraction of the time. At the end the pieces become the checkpoint, and the folder goes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlk._version import __version__
from tlk.hf.checkpoint import load_tokenizer
from tlk.hf.partial import Partial
from tlk.hf.quantized_checkpoint import QuantizedModel, save_quantized
from tlk.hf.streaming import Streamed, stream
from tlk.quant.config import QuantConfig
from tlk.quant.format import Format
from tlk.quantize.calibration import LENGTH, SAMPLES, Calibration, read_calibration
from tlk.quantize.pieces import Pieces
from tlk.quantize.plan import Plan, plan
from tlk.quantize.report import data_sha256, describe
from tlk.quantize.run import KV_DTYPES, Quantized, data_is_needed, run
from tlk.runtime.options import pick_device


def quantize(
    source: str,
    out: str | Path,
    *,
    method: str | QuantConfig,
    calibration: Any = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    ignore: Sequence[str] | None = None,
    per_layer: Mapping[str, Any] | None = None,
    double_quant: bool | None = None,
    static: bool | None = None,
    kv_cache_dtype: str | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    format: str | None = None,
    device: str = "auto",
    strict: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantize the checkpoint at `source`, a folder or a hub id, and write the result to the folder `out`.

    method: of tlk.QuantConfig, or one, whose fields the other arguments then leave alone. calibration:
    texts, the path of a JSONL file, or token ids; `samples` rows of `length` tokens of it are used.
    int8, int4-awq and int4-gptq need it, the 4-bit floats get better with it, and all others tell with it
    how far the outputs of their layers are off. kv_cache_dtype: "fp8" or "int8" also finds, from the
    calibration data, scales for a cache of keys and values. format: the checkpoint format where there
    is a choice; None is the one that most loaders read. device: where layers are worked on, "auto" is
    the GPU if there is one. strict: raise where a layer must stay in 16 bit. resume: go on with what
    an interrupted run left in `out`.partial.

    Returns what tlk_quant.json holds: method, calibration data, the error of every layer, versions.
    Raises ValueError for arguments that do not fit, CheckpointError and UnsupportedError for a source that
    cannot be quantized, FileExistsError if `out` is there already. `source` is only read.
    """
    fields: dict[str, Any] = {
        "group_size": group_size,
        "symmetric": symmetric,
        "ignore": ignore,
        "per_layer": per_layer,
        "double_quant": double_quant,
        "static": static,
    }
    config = _config(method, calibration, fields)
    out, place = Path(out).expanduser(), pick_device(device)
    _check(config, kv_cache_dtype, out)
    with stream(source) as found:
        data = _data(found, config, samples, length)
        planned = plan(found.decoder, found.sources, config, strict=strict)
        about = _identity(found, config, data, kv_cache_dtype)
        partial = Partial(out.with_name(out.name + ".partial"), about, anew=not resume)
        pieces = Pieces(found, planned, partial, place, data is not None)
        found.load("embedding", "cpu")
        result = run(
            found.decoder, planned, data, place, kv_dtype=kv_cache_dtype, load=pieces.load,
            done=pieces.done, progress=progress,
        )  # fmt: skip
        report = describe(config, planned, data, result, place, kv_cache_dtype)
        model = _model(found, planned, pieces, result, kv_cache_dtype)
        layout = save_quantized(model, out, format=format, report=report, source=found.folder)
    partial.remove()
    return report | {"format": layout}


def _config(method: str | QuantConfig, data: Any, fields: dict[str, Any]) -> QuantConfig:
    given = {name: value for name, value in fields.items() if value is not None}
    if not isinstance(method, QuantConfig):
        return QuantConfig(method, calibration=data, **given)
    if given:
        raise ValueError(f"{', '.join(given)} must be fields of the QuantConfig that method is")
    if data is None:
        return method
    if method.calibration is not None:
        raise ValueError("calibration must be given once, as an argument or in the QuantConfig")
    return replace(method, calibration=data)


def _check(config: QuantConfig, kv_cache_dtype: str | None, out: Path) -> None:
    if kv_cache_dtype is not None and kv_cache_dtype not in KV_DTYPES:
        raise ValueError(
            f"kv_cache_dtype must be None or one of {', '.join(KV_DTYPES)}, got {kv_cache_dtype!r}"
        )
    if config.calibration is None:
        if data_is_needed(config):
            raise ValueError(f"calibration must be texts, a JSONL file or ids for {config.method}")
        if kv_cache_dtype is not None:
            raise ValueError("calibration must be given to find scales for kv_cache_dtype")
    if out.exists():
        raise FileExistsError(f"{out} is there already: give a folder that is not")


def _data(found: Streamed, config: QuantConfig, samples: int, length: int) -> Calibration | None:
    if config.calibration is None:
        return None
    longest = min(length, found.decoder.config.max_position_embeddings)
    return calibration_rows(
        config.calibration, lambda: load_tokenizer(str(found.folder)),
        vocab_size=found.decoder.config.vocab_size, samples=samples, length=longest,
    )  # fmt: skip


def calibration_rows(
    data: Any, tokenizer: Callable[[], Any], *, vocab_size: int, samples: int, length: int
) -> Calibration:
    """As `read_calibration`, with the tokenizer that `tokenizer()` loads, if `data` needs one."""
    loaded: list[Any] = []

    def encode(text: str) -> list[int]:
        if not loaded:
            loaded.append(tokenizer())
        return list(loaded[0](text, verbose=False)["input_ids"])

    return read_calibration(data, encode, vocab_size=vocab_size, samples=samples, length=length)


def _identity(
    found: Streamed, config: QuantConfig, data: Calibration | None, kv_cache_dtype: str | None
) -> dict[str, Any]:
    """What must be the same for a run to go on where another stopped."""
    files = sorted({tensor.file for tensor in found.tensors.values()})
    return {
        "source": str(found.folder.resolve()),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
        "config": config.to_dict(),
        "calibration_sha256": data_sha256(data),
        "kv_cache_dtype": kv_cache_dtype,
        "version": __version__,
    }


def _model(
    found: Streamed, planned: Plan, pieces: Pieces, result: Quantized, kv_cache_dtype: str | None
) -> QuantizedModel:
    """What the pieces make, as the writer wants it."""
    formats: dict[str, Format] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for target in planned.targets.values():
        for module, height in zip(target.modules, target.heights, strict=True):
            formats[module] = target.format
            shapes[module] = height, found.tensors[f"{module}.weight"].shape[1]
    attentions = [
        found.sources[f"layers.{i}.attention.out.weight"][0].rpartition(".")[0].rpartition(".")[0]
        for i in range(planned.layers)
    ]
    return QuantizedModel(
        fields=found.fields,
        formats=formats,
        shapes=shapes,
        layers=lambda: ((module, packed) for module, _, packed in pieces.layers()),
        dense=pieces.dense,
        linears=planned.linears,
        dtype=found.dtype,
        kv_scales=dict(zip(attentions, result.kv_scales, strict=False)),
        kv_dtype=kv_cache_dtype,
    )
