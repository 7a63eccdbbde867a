"""Quantized checkpoints through transformers' own `from_pretrained`, read by tlk instead of other packages.

    tlk.register_quantizers()
    model = AutoModelForCausalLM.from_pretrained("a GPTQ, AWQ or ModelOpt checkpoint", dtype="bfloat16")
    model = tlk.optimize(model)

transformers keeps two tables of quantization methods: the class of their config, and the quantizer that
prepares a model for its files. It gives GPTQ and AWQ to the package gptqmodel, and ModelOpt to nobody:
it takes the codes for weights. Registering puts tlk's two classes into the tables, until `undo`. Nothing
is registered by importing tlk, and no class of transformers is changed.

Loading: each quantized linear layer becomes a module without weights, but with the tensors that the
files have of it, so that transformers loads, places and accounts for them as for any other. When they are
there, `Scheme.read` makes a `QuantLinear` of them.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tlk.errors import CheckpointError, UnsupportedError
from tlk.hf.hub import read_quantization
from tlk.hf.quant_linear import quantized_like
from tlk.hf.quantized_model import one_device
from tlk.hf.quantized_weights import BIAS, CACHE, check_listed, kv_dtype_of, suffixes_of
from tlk.quant.files.layer import Scheme
from tlk.quant.files.recognise import METHODS, recognise

DEFAULT = ("gptq", "awq", "modelopt")
"""What transformers does not load without other packages, or not at all."""
CHOICES = tuple(name for name in METHODS if name != "bitsandbytes")
"""Methods whose files tlk can read here; transformers asks bitsandbytes' own config class for its files."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
Header = Mapping[str, torch.Tensor]


class StoredConfig(QuantizationConfigMixin):
    """A checkpoint's quantization config with all of its fields, as they stand in config.json."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class StoredQuantizer(HfQuantizer):
    """Makes `QuantLinear`s of the layers that a checkpoint stores quantized, in any format that tlk reads."""

    requires_calibration = True  # so that transformers refuses to quantize with it

    def update_device_map(self, device_map: Any) -> Any:
        """One device, "auto" being the GPU if there is one; UnsupportedError for several."""
        return None if device_map is None else {"": one_device(device_map)}

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        folder, header = _header(checkpoint_files)
        fields = self.quantization_config.to_dict()
        fields = read_quantization(folder, {"quantization_config": fields}) or fields
        self.scheme = recognise(fields)
        stored = _layers(folder, model, self.scheme, header)
        for name, tensors in stored.items():
            model.set_submodule(name, Stored(model.get_submodule(name), tensors))  # type: ignore[arg-type]
        keys = _cache_keys(model, header)
        files = [Path(str(file)) for file in checkpoint_files]
        self.kv_scales = _kv_scales(files, keys), kv_dtype_of(fields)
        own: Any = model  # whose cache reads them, and not a module
        own._keys_to_ignore_on_load_unexpected |= {re.escape(k) for p in keys.values() for k in p}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, Stored):
                tensors = dict(module.named_buffers())
                shape = (module.out_features, module.in_features)
                layer = self.scheme.read(name, tensors, shape)
                model.set_submodule(name, quantized_like(module, *layer, module.dtype))  # type: ignore[arg-type]
        if self.kv_scales[0]:
            model.__dict__["_tlk_kv_scales"] = self.kv_scales

    def is_serializable(self) -> bool:
        """UnsupportedError: transformers asks when it saves, and tlk saves what it has optimized."""
        raise UnsupportedError(
            "transformers cannot save the layers that tlk read: call tlk.optimize(model) first, whose "
            "save_pretrained writes the standard layout of their format"
        )

    @property
    def is_trainable(self) -> bool:
        """False."""
        return False


class Stored(nn.Module):
    """A linear layer with the tensors that the files have of it, under their names, and no weight yet."""

    def __init__(self, linear: nn.Linear, tensors: Header) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.register_parameter(BIAS, linear.bias)
        for suffix, tensor in tensors.items():
            self.register_buffer(suffix, tensor)


class Registered:
    """What `register_quantizers` did, to be undone: by `undo`, or at the end of a with statement."""

    def __init__(self, methods: tuple[str, ...]) -> None:
        tables: tuple[dict[str, Any], ...] = (
            auto.AUTO_QUANTIZER_MAPPING,
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
        )
        self._before = [(table, name, table.get(name)) for table in tables for name in methods]
        for name in methods:
            tables[0][name], tables[1][name] = StoredQuantizer, StoredConfig

    def undo(self) -> None:
        """Give the methods back to whom they belonged; a second time nothing happens."""
        for table, name, before in self._before:
            if before is None:
                table.pop(name, None)
            else:
                table[name] = before
        self._before = []

    def __enter__(self) -> "Registered":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def register_quantizers(*methods: str) -> Registered:
    """Have transformers load checkpoints of these methods with tlk, and not with other packages.

    methods: of "gptq", "awq", "modelopt", "compressed-tensors", "fp8" and "fbgemm_fp8"; without any,
    the first three, which transformers loads with gptqmodel or not at all. From now on
    `from_pretrained` of transformers' own classes makes `QuantLinear`s of their layers, which run in
    transformers' forward, slowly, and after `tlk.optimize(model)` on tlk's kernels. It takes dtype and
    a device_map of one device; a quantization_config of another class is an error of transformers'.
    Scales of an 8-bit cache serve `tlk.optimize(model, kv_cache_dtype="fp8")`.

    Returns what undoes it, also as a context manager:

        with tlk.register_quantizers("gptq"):
            model = AutoModelForCausalLM.from_pretrained(path)

    Raises ValueError for another method. Loading raises CheckpointError and UnsupportedError, naming
    the module and the tensor, for files that do not fit the config or are of a kind that tlk does not read.
    """
    for name in methods:
        if name not in CHOICES:
            raise ValueError(f"methods must be of {', '.join(CHOICES)}, got {name!r}")
    return Registered(methods or DEFAULT)


def _header(files: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a checkpoint's safetensors `files`, and all their tensors by key, on the device meta."""
    paths = [Path(str(file)) for file in files or ()]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        raise UnsupportedError(
            "a quantized checkpoint must be a folder or a hub id with safetensors files, got "
            f"{', '.join(path.name for path in paths) or 'a state_dict'}"
        )
    return paths[0].parent, {key: tensor for path in paths for key, tensor in _tensors(path)}


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            for key in file.offset_keys():
                part = file.get_slice(key)
                if (name := part.get_dtype()) not in DTYPES:
                    raise UnsupportedError(f"{path}: {key} is stored as {name}")
                yield key, torch.empty(part.get_shape(), dtype=DTYPES[name], device="meta")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error


def _layers(
    folder: Path, model: nn.Module, scheme: Scheme, header: Header
) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors by suffix of every linear layer of `model` that the files store quantized.

    Raises CheckpointError where config, files and model disagree about a layer.
    """
    linear = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in linear | {key.rpartition(".")[0] for key in header}:
        suffixes = suffixes_of(name, header)
        quantized = scheme.holds(suffixes)
        if name in linear:
            check_listed(folder, scheme, name, suffixes)
        elif quantized:
            raise UnsupportedError(
                f"{folder}: {name} is quantized with {scheme.method}, and is no linear layer of "
                f"{type(model).__name__} as transformers builds it"
            )
        if quantized:
            found[name] = {suffix: header[f"{name}.{suffix}"] for suffix in suffixes}
    if strangers := sorted(set(scheme.named()) - linear):
        raise CheckpointError(
            f"{folder}: its {scheme.method} config quantizes modules that {type(model).__name__} does "
            f"not have: {', '.join(strangers)}"
        )
    if not found:
        raise CheckpointError(
            f"{folder} says that it is quantized with {scheme.method}, but no layer of it is"
        )
    return found


def _cache_keys(model: nn.Module, header: Header) -> dict[int, tuple[str, str]]:
    """Layer to the keys of the scales of its keys and values, where the files have them."""
    attentions = [name for name, module in model.named_modules() if hasattr(module, "q_proj")]
    found = {}
    for i, name in enumerate(attentions):
        pairs = [(f"{name}.{k}", f"{name}.{v}") for k, v in CACHE]
        if there := next((pair for pair in pairs if set(pair) <= header.keys()), None):
            found[i] = there
    return found


def _kv_scales(
    files: list[Path], keys: Mapping[int, tuple[str, str]]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    wanted = {key for pair in keys.values() for key in pair}
    read: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            read |= {key: file.get_tensor(key).float() for key in wanted & set(file.offset_keys())}
    return {i: (read[k], read[v]) for i, (k, v) in keys.items()}


def is_ours(model: Any) -> bool:
    """Whether transformers loaded `model` with a quantizer of `register_quantizers`."""
    return isinstance(getattr(model, "hf_quantizer", None), StoredQuantizer)
