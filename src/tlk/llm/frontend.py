"""What `LLM` and `AsyncLLM` share: loading, the engine, its ledger, and checking what comes in."""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from tlk.errors import UnsupportedError
from tlk.llm.inputs import REFUSALS, Prepared, Prompt, which
from tlk.llm.load import load
from tlk.llm.requests import Requests
from tlk.quant.config import QuantConfig
from tlk.quantize.in_place import as_config
from tlk.runtime.engine import Engine
from tlk.runtime.memory import MemoryLedger
from tlk.runtime.options import EngineOptions
from tlk.runtime.params import SamplingParams


class Frontend:
    """A model with its engine."""

    def __init__(
        self,
        model: str | nn.Module,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory: int | None = None,
        kv_cache_dtype: str = "auto",
        quantization: str | QuantConfig | None = None,
        calibration: Any = None,
        tensor_parallel_size: int = 1,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        compile: bool = False,
        deterministic: bool = False,
        seed: int = 0,
        tokenizer: Any = None,
        device: str = "auto",
    ) -> None:
        """Load `model` and start its engine.

        model: a folder, a hub id, or a causal language model of transformers, optimized or not, whose
        weights are shared; do not move or change them meanwhile. dtype "auto": the checkpoint's own.
        tokenizer: an object, a path or hub id; None: the one that lies with the model.
        max_model_len: tokens of one sequence; None: all the model can place. It is fitted down, with a
        notice, to what the cache can hold. max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of one step. gpu_memory_utilization: the share of the GPU's memory
        that weights, graphs, activations and cache may take; kv_cache_memory: bytes of the cache instead
        (on a CPU 1 GiB unless given). kv_cache_dtype: "auto", "fp8", "int8", or "float32",
        "float16" or "bfloat16"; 8 bits with the checkpoint's scales, or those that `calibration` gives, else 1
        and an UncalibratedWarning.
        quantization: a method or QuantConfig, for a checkpoint in 16 bit; one that is quantized is recognized
        by itself. calibration: texts, a JSONL file's path or token ids, where the method needs them.
        enforce_eager: no CUDA graphs. compile: torch.compile of the decoder, inside the graphs.
        deterministic: the same request gives the same tokens whatever runs beside it, at some cost.
        seed: of requests that bring none. device: "auto", "cpu", "cuda" or "cuda:N".

        The memory ledger, the seconds of each phase and any notice are printed to stderr, and stay in
        `ledger`, `timings` and `notices`. `default_params` are the model's own, from its
        generation_config.json; `engine` is the engine underneath.

        Raises CheckpointError for a broken checkpoint, UnsupportedError for what has no kernel yet,
        ValueError or TypeError naming the argument, CapacityError if the cache cannot hold a request.
        """
        _check_ranks(tensor_parallel_size)
        wanted = None if quantization is None else as_config(quantization, calibration)
        options = EngineOptions(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory=kv_cache_memory,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=enable_prefix_caching,
            enforce_eager=enforce_eager,
            compile=compile,
            deterministic=deterministic,
            seed=seed,
        )
        loaded = load(model, dtype, device, tokenizer, wanted, kv_cache_dtype)
        self.engine = Engine(loaded.decoder, options, eos=loaded.eos, progress=True)
        self.default_params = loaded.default
        self.timings: dict[str, float] = {"load": loaded.seconds, **self.engine.timings}
        self.device = loaded.decoder.embedding.weight.device
        self._text, self._numbers = loaded.text, itertools.count()
        self._requests = Requests(self.engine, loaded.text)
        tqdm.write("\n".join([*self.notices, str(self.ledger), self._phases()]), file=sys.stderr)

    @property
    def ledger(self) -> MemoryLedger:
        """Bytes of weights, graphs, activations and cache, and what is free beside them."""
        return self.engine.ledger

    @property
    def notices(self) -> list[str]:
        """What differs from what was asked for, a line each."""
        return self.engine.notices

    @property
    def max_model_len(self) -> int:
        """The most tokens of one sequence, prompt and output, as fitted to the cache."""
        return self.engine.max_model_len

    def get_tokenizer(self) -> Any:
        """The tokenizer; UnsupportedError if the model came without one."""
        return self._text.needed("get_tokenizer()")

    def _phases(self) -> str:
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.timings.items())
        return f"start: {phases}"

    def _prepare(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
    ) -> list[Prepared]:
        """Tokenize and check every prompt; an error names which one it is about."""
        prepared = []
        for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            try:
                prepared.append(self._text.prepare(prompt, wanted, self.default_params))
            except REFUSALS as error:
                raise which(i, len(prompts), error) from error
        return prepared


def _check_ranks(tensor_parallel_size: int) -> None:
    if isinstance(tensor_parallel_size, bool) or not isinstance(tensor_parallel_size, int):
        raise TypeError(
            f"tensor_parallel_size must be a whole number, got {tensor_parallel_size!r}"
        )
    if tensor_parallel_size < 1:
        raise ValueError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
    if tensor_parallel_size > 1:
        raise UnsupportedError(
            f"tensor_parallel_size {tensor_parallel_size} is not supported yet; 1 works"
        )
