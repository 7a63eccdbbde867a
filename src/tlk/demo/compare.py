"""What `tlk demo` shows: one model generating with transformers alone, then on tlk."""

import platform
import resource
import statistics
import textwrap
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tlk import __version__
from tlk.demo.generate import EMBEDDED, encode, load
from tlk.hf.execution import Optimized
from tlk.optimize import Report, optimize, report

PROMPT = 'class Stack:\n    """'
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Run:
    """One way of generating: its tokens, its median speed and its memory."""

    tokens: list[int]
    tokens_per_second: float
    kv_cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Greedy generation from the same weights and prompt by transformers alone and by tlk.

    peak_bytes of a run is what torch allocated on the GPU; on a CPU the most memory that the whole
    process has held so far.
    """

    prompt: str
    text: str
    transformers: Run
    tlk: Run
    parameter_bytes: int
    report: Report
    device: str
    versions: dict[str, str]

    @property
    def matched(self) -> bool:
        """Whether both gave the same tokens."""
        return self.transformers.tokens == self.tlk.tokens

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, for JSON."""
        runs = {"transformers": self.transformers, "tlk": self.tlk}
        return {
            "prompt": self.prompt,
            "tokens": self.tlk.tokens,
            "text": self.text,
            "matched": self.matched,
            "tokens_per_second": {name: run.tokens_per_second for name, run in runs.items()},
            "memory": {
                "parameter_bytes": self.parameter_bytes,
                "kv_cache_bytes": {name: run.kv_cache_bytes for name, run in runs.items()},
                "peak_bytes": {name: run.peak_bytes for name, run in runs.items()},
            },
            "report": self.report.to_dict(),
            "device": self.device,
            "versions": self.versions,
        }

    def __str__(self) -> str:
        theirs, ours, mib = self.transformers, self.tlk, 2**20
        return "\n".join(
            [
                f"device        {self.device}",
                f"tokens        {len(ours.tokens)} new, {self._agreement()}",
                f"tokens/s      transformers {theirs.tokens_per_second:.1f}, tlk "
                f"{ours.tokens_per_second:.1f} (median of {REPEATS})",
                f"memory, MiB   parameters {self.parameter_bytes / mib:.2f}, KV cache transformers "
                f"{theirs.kv_cache_bytes / mib:.3f}, tlk {ours.kv_cache_bytes / mib:.3f}, peak "
                f"{theirs.peak_bytes / mib:.0f}, {ours.peak_bytes / mib:.0f}",
                str(self.report),
                textwrap.indent(self.prompt + self.text, "    | ", lambda line: True),
            ]
        )

    def _agreement(self) -> str:
        if self.matched:
            return "the same from both"
        pairs = zip(self.transformers.tokens, self.tlk.tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.tlk.tokens))
        return f"MISMATCH: the first {same} agree, then transformers and tlk part"


def compare(
    path: str = str(EMBEDDED),
    prompt: str = PROMPT,
    *,
    max_new_tokens: int = 64,
    device: str = "auto",
    dtype: str = "float32",
) -> Comparison:
    """Generate from `prompt` with the model at `path`, as transformers does and optimized by tlk.

    In float32 both give the same tokens; in 16 bits a rounding may decide between two tokens that
    are equally likely. Raises what loading and `encode` raise.
    """
    model, tokenizer = load(path, dtype, device)
    ids = encode(model, tokenizer, prompt, max_new_tokens)
    theirs = _run(model, ids, max_new_tokens)
    optimize(model)
    ours = _run(model, ids, max_new_tokens)
    return Comparison(
        prompt=prompt,
        text=tokenizer.decode(ours.tokens, skip_special_tokens=True),
        transformers=theirs,
        tlk=ours,
        parameter_bytes=sum(p.nbytes for p in model.parameters()),
        report=report(model),
        device=_device(ids),
        versions=_versions(),
    )


def _run(model: Any, ids: Tensor, max_new_tokens: int) -> Run:
    """Generate once to compile what must be compiled, then `REPEATS` times against the clock.

    transformers is asked for its cache, to measure it; tlk's runtime keeps its own.
    """
    ours = isinstance(model, Optimized)
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + REPEATS):
        _wait(ids)
        start = time.perf_counter()
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,  # one sequence is never padded; without it transformers says so
            return_dict_in_generate=not ours,
        )
        _wait(ids)
        seconds.append(time.perf_counter() - start)
    sequences = out if ours else out.sequences
    tokens = sequences[0, ids.shape[1] :].tolist()
    return Run(
        tokens=tokens,
        tokens_per_second=len(tokens) / statistics.median(seconds[1:]),
        kv_cache_bytes=(
            report(model).runtime.get("kv_cache_bytes", 0)
            if ours
            else _cache_bytes(out.past_key_values)
        ),
        peak_bytes=_peak_bytes(ids),
    )


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)


def _cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _peak_bytes(ids: Tensor) -> int:
    if ids.is_cuda:
        return torch.cuda.max_memory_allocated(ids.device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _device(ids: Tensor) -> str:
    if not ids.is_cuda:
        return "cpu: no kernels are compiled, every op runs as its PyTorch reference"
    major, minor = torch.cuda.get_device_capability(ids.device)
    name = torch.cuda.get_device_name(ids.device)
    return f"{name}, sm_{major}{minor}: kernels are compiled by Triton"


def _versions() -> dict[str, str]:
    own = {"tlk": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {name: version(name) for name in ("triton", "transformers")}
