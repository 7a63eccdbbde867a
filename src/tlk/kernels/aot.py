"""Ahead-of-time compilation: what every kernel becomes on every GPU, seen on a machine that has none.

    with dry_run(90) as launches:      # the whole host path runs: checks, configs, grids, compiler
        rms_norm(x, weight)            # x lies on the CPU; nothing executes, nothing is computed
    violations(measure(launches[0]))   # [] or what is wrong with the machine code

Triton's wheel ships ptxas and cuobjdump, so no CUDA toolkit and no driver are needed. A kernel costs
0.3-0.6 s to compile (2-core machine, triton 3.7.1); LLVM aborts the whole
process on some kernels, so compile in `forked` children.
"""

import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
import triton.experimental.gluon.nvidia.hopper  # at the first launch anyway: 0.1 s in every child
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.cache import triton_key

from tlk.kernels._op import kernels_on_cpu

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a launch must fit: `shared` is the largest dynamic shared memory of a block, in bytes."""

    name: str
    sm_count: int
    shared: int


GPUS = {
    75: Gpu("T4", 40, 64 * 1024),
    80: Gpu("A100", 108, 163 * 1024),
    86: Gpu("RTX 3090", 82, 99 * 1024),
    89: Gpu("RTX 4090", 128, 99 * 1024),
    90: Gpu("H200", 132, 227 * 1024),
    100: Gpu("B200", 148, 227 * 1024),
    120: Gpu("RTX 5090", 170, 99 * 1024),
}
LARGE = 64 * 1024  # bytes from which a tensor is worth loading in vectors
# Bytes outside of loops: the assembler of Triton 3.7 spills up to 24 where that of 3.6 spills none,
# and that of 3.9 up to 56. In a main loop no spill is accepted.
MAX_SPILL = 64
DECLARED_LIMIT = (
    48 * 1024
)  # bytes of shared memory without asking, and Triton asks for its own only


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch of a dry run. `large`: a 16-byte aligned tensor of `LARGE` bytes is in it."""

    kernel: str
    sm: int
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    large: bool
    compiled: CompiledKernel


@contextlib.contextmanager
def dry_run(sm: int) -> Iterator[list[Launch]]:
    """Run the host path of kernels on CPU tensors for capability `sm`, and record their launches.

    Kernels are compiled for `sm` and not executed; other tensor arithmetic returns uninitialized
    memory. Raises triton's OutOfResources for a block over the shared memory of `sm`, ValueError
    for a grid over the limits or an `sm` not in `GPUS`, RuntimeError for code that reads device
    data on the host or tunes.
    """
    if sm not in GPUS:
        raise ValueError(f"sm must be one of {sorted(GPUS)}, got {sm}")
    previous = driver.active if torch.cuda.is_available() else None
    dry = _DryDriver(sm)
    driver.set_active(dry)
    try:
        with kernels_on_cpu(sm, GPUS[sm].sm_count), _Uncomputed():
            yield dry.launches
    finally:
        driver.set_active(previous)


class _DryDriver:
    """Stands where Triton expects the CUDA driver."""

    def __init__(self, sm: int) -> None:
        self.sm = sm
        self.launches: list[Launch] = []
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm  # Triton keeps compiled kernels by device: one SM never gets another's

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        gpu = GPUS[self.sm]
        return {"max_shared_mem": gpu.shared, "multiprocessor_count": gpu.sm_count, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads per block

    def get_benchmarker(self) -> Callable[..., Any]:
        raise RuntimeError("a kernel is autotuned at its call: use a table or a heuristic")


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise ValueError(f"grid of {self.metadata.name} must fit the GPU, got {(x, y, z)}")
        dry = driver.active  # not the one this launcher was made under: kernels outlive a dry run
        kernels = self.source.fn.device_caches[dry.sm][0].values()
        compiled = next(k for k in kernels if k.hash == self.metadata.hash)
        large = any(
            isinstance(a, Tensor) and a.data_ptr() % 16 == 0 and a.nbytes >= LARGE for a in args
        )
        m = self.metadata
        dry.launches.append(
            Launch(m.name, dry.sm, (x, y, z), m.num_warps, m.shared, large, compiled)
        )


class _Uncomputed(TorchDispatchMode):
    """Give the results of tensor arithmetic their shapes and no values: cuBLAS is not here to help."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "tlk":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a tensor is read on the host: that synchronizes with the GPU")
        if func.is_view or not (tensors or any(isinstance(a, list) for a in args)):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        shapes = tree_map_only(Tensor, _as("meta"), (args, {**kwargs, "device": "meta"}))
        if "device" not in kwargs:
            shapes[1].pop("device")
        return tree_map_only(Tensor, _as("cpu"), func(*shapes[0], **shapes[1]))


def _as(device: str) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)


@dataclass(frozen=True, slots=True)
class Metrics:
    """What the machine code of one kernel needs and does; loads are static counts of instructions.

    `loads_128` counts loads of 128 bits a thread or more and TMA, `loads_32` those of 32 bits or
    less and of one int64. `spill_bytes` is what ptxas calls spill stores. `waits` counts the places
    where a kernel waits for earlier ones, which it must if it is launched as a `dependent` of them.
    `declared_shared` is shared memory of inline assembly, which Triton does not know of.
    """

    kernel: str
    sm: int
    num_warps: int
    shared: int
    tensor_memory: int
    registers: int
    spill_bytes: int
    local_in_loop: int
    wants_tensor_cores: bool
    tensor_core_ops: int
    loads_128: int
    loads_64: int
    loads_32: int
    wide_stores: int
    dependent: bool
    waits: int
    declared_shared: int = 0


class Instruction(NamedTuple):
    """One machine instruction; `name` is the opcode up to its first dot: STL of STL.64."""

    address: int
    name: str
    opcode: str
    operands: str


_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TENSOR_CORE = {"HMMA", "IMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IGMMA"} | {
    f"UTC{kind}MMA" for kind in "HQOI"
}
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_TENSOR_CORE_PTX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_ACCESS_PTX = re.compile(r"\b(ld|st)\.[\w.:]*\bglobal\b[\w.:]*?(?:\.v([248]))?\.[bfsu](\d+)\s")
_ASYNC_PTX = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]*\], \[[^]]*\], (\w+)")
_DECLARED_PTX = re.compile(r"^\s*(?:{ )?\.shared[^;]*\[(\d+)\];", re.MULTILINE)
_BULK_PTX = re.compile(r"\bcp\.async\.bulk\.[\w.:]*?\b(shared::cluster|global)\b")


def measure(compiled: CompiledKernel) -> Metrics:
    """Count what matters in the code of `compiled` (5 ms; 0.3 s if it uses local memory)."""
    ptx, cubin, metadata = compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    # Disassembling takes 0.3 s however short the kernel, so only where there is something to see.
    spilled = "STACK:0 " not in usage or "LOCAL:0 " not in usage
    code = _instructions(_cuobjdump(cubin, "-sass")) if spilled else []
    # Where warps have roles of their own, the outermost loop hands these out and holds all the code.
    loop = [] if "setmaxnreg" in ptx else _main_loop(code)
    loads, stores = _accesses(ptx)
    return Metrics(
        kernel=metadata.name,
        sm=metadata.target.arch,
        num_warps=metadata.num_warps,
        shared=metadata.shared,
        tensor_memory=metadata.tmem_size or 0,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spill_bytes=sum(_bytes(instruction) for instruction in code if instruction.name == "STL"),
        local_in_loop=_count(loop, {"LDL", "STL"}),
        wants_tensor_cores=_wants_tensor_cores(compiled.asm.get("ttir", "")),
        tensor_core_ops=len(_TENSOR_CORE_PTX.findall(ptx)),
        loads_128=sum(n for bits, n in loads.items() if bits >= 128),
        loads_64=loads[64],
        loads_32=sum(n for bits, n in loads.items() if bits < 64),
        wide_stores=sum(n for bits, n in stores.items() if bits >= 64),
        dependent=metadata.launch_pdl,
        waits=ptx.count("griddepcontrol.wait"),
        declared_shared=sum(int(size) for size in _DECLARED_PTX.findall(ptx)),
    )


def violations(metrics: Metrics, large: bool = True) -> list[str]:
    """What is wrong with a kernel; `large`: it reads or writes tensors worth vector loads."""
    m, limit, wrong = metrics, GPUS[metrics.sm].shared, []
    if m.shared > limit:
        wrong.append(f"{m.shared} bytes of shared memory, sm_{m.sm} has {limit}")
    if m.declared_shared and m.shared + m.declared_shared > DECLARED_LIMIT:
        both = f"{m.shared} + {m.declared_shared} declared bytes of shared memory"
        wrong.append(f"{both}: a launch gets {DECLARED_LIMIT}")
    if m.tensor_memory > 512:
        wrong.append(f"{m.tensor_memory} columns of tensor memory, there are 512")
    if m.spill_bytes > MAX_SPILL:
        wrong.append(f"{m.spill_bytes} bytes spilled, at most {MAX_SPILL} are accepted")
    if m.local_in_loop:
        wrong.append(f"{m.local_in_loop} local-memory instructions in the main loop")
    if m.wants_tensor_cores and m.sm >= 80 and not m.tensor_core_ops:
        wrong.append("tl.dot without a tensor-core instruction")
    if m.dependent and (m.sm < 90 or not m.waits):
        wrong.append("launched as a dependent below sm_90, or without gdc_wait")
    wide = m.loads_128 + m.loads_64
    scalar = m.loads_32 > max(16, wide) or (m.loads_32 > 0 and wide + m.wide_stores == 0)
    if large and scalar:  # a few beside vectors are indices, scales, lengths
        wrong.append(f"{m.loads_32} loads of at most 32 bits, {wide} wider")
    return wrong


def _accesses(ptx: str) -> tuple[Counter[int], Counter[int]]:
    """How many loads from and stores to global memory move so many bits a thread."""
    loads: Counter[int] = Counter(8 * int(n, 0) for n in _ASYNC_PTX.findall(ptx))
    stores: Counter[int] = Counter()
    for kind, vector, bits in _ACCESS_PTX.findall(ptx):
        width = int(vector) * int(bits) if vector else min(int(bits), 32)  # an int64 is no vector
        (loads if kind == "ld" else stores)[width] += 1
    for target in _BULK_PTX.findall(ptx):
        (stores if target == "global" else loads)[128] += 1
    return loads, stores


def _cuobjdump(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), flag, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _instructions(listing: str) -> list[Instruction]:
    matches = (_INSTRUCTION.match(line) for line in listing.splitlines())
    return [Instruction(int(m[1], 16), m[2].split(".")[0], m[2], m[3]) for m in matches if m]


def _main_loop(code: list[Instruction]) -> list[Instruction]:
    """The shortest loop with the most tensor-core instructions; the longest if there are none."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    best: tuple[tuple[int, int], list[Instruction]] = ((0, 0), [])
    for end, branch in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", branch.operands)
        if branch.name != "BRA" or target is None:
            continue
        body = code[index.get(int(target[1], 16), end + 1) : end + 1]
        if len(body) < 4 or _count(body, {"EXIT"}):
            continue  # EXIT inside: a spin wait that was moved out of line
        mma = _count(body, _TENSOR_CORE)
        best = max(best, ((mma, -len(body) if mma else len(body)), body), key=lambda b: b[0])
    return best[1]


def _count(code: list[Instruction], names: set[str]) -> int:
    return sum(instruction.name in names for instruction in code)


def _bytes(instruction: Instruction) -> int:
    width = re.search(r"\.(64|128)\b", instruction.opcode)
    return int(width[1]) // 8 if width else 4


def _wants_tensor_cores(ttir: str) -> bool:
    """Whether a kernel has a dot that is not float32 in full precision."""
    dots = [line for line in ttir.splitlines() if "tt.dot" in line]
    return any("= tf32" in dot or "xf32> *" not in dot for dot in dots)


@dataclass(frozen=True, slots=True)
class Failure:
    """A child died; `message` is the end of what it wrote to stderr."""

    message: str


@dataclass(frozen=True, slots=True)
class _Child(Generic[T]):
    index: int
    process: BaseProcess
    log: Path


def forked(calls: Iterable[Callable[[], T]], workers: int = 1) -> Iterator[tuple[int, T | Failure]]:
    """Run each call in a child process, `workers` at a time; yield (index, result) as they end.

    An exception or a crash in a child is a `Failure`. A child starts as a copy of this process at
    that moment, so imports and closures need no pickling; results do.
    """
    triton_key()  # hashes libtriton.so: done here once, it saves every child 0.3 s
    running: dict[Connection, _Child[T]] = {}
    with tempfile.TemporaryDirectory() as logs:
        try:
            for index, call in enumerate(calls):
                receiver, child = _start(index, call, Path(logs) / f"{index}.log")
                running[receiver] = child
                if len(running) == workers:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        finally:
            for child in running.values():
                child.process.kill()


def isolated(call: Callable[[], T]) -> T:
    """Run `call` in a child process; RuntimeError if it raises or crashes."""
    ((_, result),) = forked([call])
    if isinstance(result, Failure):
        raise RuntimeError(result.message)
    return result


def _start(index: int, call: Callable[[], T], log: Path) -> tuple[Connection, _Child[T]]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(call, sender, log))
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads; ours hold no lock
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    return receiver, _Child(index, process, log)


def _answer(call: Callable[[], Any], sender: Connection, log: Path) -> None:
    sys.stdout = sys.stderr = log.open("w")  # ptxas errors come with the whole PTX on stdout
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    sender.send(call())


def _finished(running: dict[Connection, _Child[T]]) -> Iterator[tuple[int, T | Failure]]:
    for receiver in list(wait(list(running))):
        assert isinstance(receiver, Connection)
        child = running.pop(receiver)
        try:
            result: T | Failure = receiver.recv()
        except EOFError:
            child.process.join()
            lines = child.log.read_text().strip().splitlines()
            reason = "\n".join(lines[-3:]) or f"exit code {child.process.exitcode}"
            result = Failure(reason)
        child.process.join()
        receiver.close()
        yield child.index, result
