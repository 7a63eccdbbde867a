"""What an engine may use, checked before anything is allocated."""

from dataclasses import dataclass

import torch

from tlk.errors import UnsupportedError

KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The limits and the mode of an engine.

    max_model_len: tokens of one sequence, prompt and output; None: what the model was made for. It is
    fitted down, with a notice, to what the cache can hold.
    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens of one step.
    gpu_memory_utilization: the share of the GPU's memory that weights, graphs, activations and cache
    may take together. kv_cache_memory: bytes of the cache instead; None: what is left of that share,
    or 1 GiB on a CPU. kv_cache_dtype "auto": the model's own; "fp8" (e4m3) and "int8": 8 bits, with the
    scales that `tlk.models.decoder.set_kv_scales` gave the decoder, else 1. page_size: tokens of a
    page; None: what the attention kernels are fastest with on the device.
    enforce_eager: no CUDA graphs. compile: torch.compile(fullgraph=True) of the decoder, inside the
    graphs. lazy_graphs: capture a batch size when it first comes instead of all at the start.
    deterministic: logits do not depend on the other sequences of a step, bit for bit.

    Raises ValueError or TypeError naming the field, UnsupportedError for a kv_cache_dtype that has no
    kernel.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    kv_cache_memory: int | None = None
    kv_cache_dtype: str = "auto"
    page_size: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    compile: bool = False
    deterministic: bool = False
    lazy_graphs: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            _check_whole(name, getattr(self, name))
        for name in ("max_model_len", "kv_cache_memory", "page_size"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be a whole number, got {self.seed!r}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise TypeError(f"gpu_memory_utilization must be a number, got {share!r}")
        if not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {share}")
        check_kv_dtype(self.kv_cache_dtype)

    def kv_dtype(self, model: torch.dtype) -> torch.dtype:
        """The dtype of the cache of a model in dtype `model`."""
        return kv_dtype(self.kv_cache_dtype, model)


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU if there is one; UnsupportedError for "cuda" without one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {device}: tlk runs on cpu and cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device}: torch finds no GPU here, `tlk doctor` says why")
    return chosen


def check_kv_dtype(name: str) -> None:
    """Raise UnsupportedError unless kv_cache_dtype `name` has kernels."""
    if name != "auto" and name not in KV_DTYPES:
        known = ", ".join(("auto", *KV_DTYPES))
        raise UnsupportedError(f"kv_cache_dtype {name!r} has no kernel; these have: {known}")


def kv_dtype(name: str, model: torch.dtype) -> torch.dtype:
    """The dtype that kv_cache_dtype `name` stands for, in a model of dtype `model`."""
    return model if name == "auto" else KV_DTYPES[name]


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
