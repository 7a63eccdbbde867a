"""Run @triton.jit kernels on CPU tensors, in numbers a GPU would give.

    with interpret():
        kernel[grid](...)          # the same kernel compiles, or runs on a GPU, outside of the block

Triton's own interpreter is the base, corrected where it is wrong (Triton 3.6 to 3.9):
bf16 values are handled as the integers that store them (in tl.dot, arithmetic, tl.sum, casts); rounding
to bf16 truncates, rounding to fp8 carries wrongly, NaN and infinity of fp8 decode to numbers; libdevice
is missing; a pointer that is out of bounds ends the process or reads garbage; dependent launches are
not known. Here a program that was launched dependently must wait, and before it writes.

Its switch, the variable TRITON_INTERPRET, holds for a whole process and must stay unset: here the
language is patched for the time of a block. Not modelled: races (programs run one after another), shared
memory, tf32 (float32 dots are exact to float32), and the order of a sum.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.extra import cuda, libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

from tests import assembly
from tests.libdevice import LIBDEVICE, erf
from tlk.kernels import _kv_codes
from tlk.kernels._op import kernels_on_cpu

Array = np.ndarray[Any, Any]

FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
FP8_VALUES = {
    dtype: torch.arange(256, dtype=torch.uint8).view(stored).float().numpy()
    for dtype, stored in FP8.items()
}
FP8_LARGEST = {tl.float8e4nv: 0x7E, tl.float8e5: 0x7B}  # the codes of 448 and of 57344
FP8_NAN = 0x7F
BF16_NAN = 0x7FFF
ENCODED = (tl.bfloat16, *FP8)  # what numpy has no dtype for: stored as unsigned integers


def decode(data: Array, dtype: tl.dtype) -> Array:
    """The numbers that `data` stands for: float32 if it stores bf16 or fp8, else itself."""
    if dtype.scalar == tl.bfloat16:
        return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
    if dtype.scalar in FP8:
        return FP8_VALUES[dtype.scalar][np.asarray(data).view(np.uint8)]
    return data


def encode(values: Array, dtype: tl.dtype, toward_zero: bool = False) -> Array:
    """`values` as they are stored in `dtype`, rounded to nearest even (bf16 also `toward_zero`)."""
    if dtype.scalar == tl.bfloat16:
        return _encode_bf16(values, toward_zero)
    if dtype.scalar in FP8:
        return _encode_fp8(values, dtype.scalar)
    return np.asarray(values).astype(stock._get_np_dtype(dtype.scalar))


def _encode_bf16(values: Array, toward_zero: bool) -> Array:
    values = np.asarray(values)
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(values.shape).view(np.uint32)
    half = np.uint32(0 if toward_zero else 0x7FFF)
    odd = np.uint32(0) if toward_zero else (bits >> 16) & 1
    rounded = ((bits + (odd + half)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(BF16_NAN), rounded)


def _encode_fp8(values: Array, dtype: tl.dtype) -> Array:
    """Nearest even, and the largest finite value for all beyond it, as cvt.rn.satfinite."""
    values = np.asarray(values, np.float32)
    codes = FP8_VALUES[dtype][: FP8_LARGEST[dtype] + 1]
    middles = (codes[1:] + codes[:-1]) / 2
    below = np.searchsorted(middles, np.abs(values), "left")
    above = np.searchsorted(middles, np.abs(values), "right")
    tie_to_even = np.where((below == above) | (below % 2 == 0), below, above).astype(np.uint8)
    signed = tie_to_even | (np.signbit(values).astype(np.uint8) << 7)
    return np.where(np.isnan(values), np.uint8(FP8_NAN), signed)


def number(handle: TensorHandle) -> Array:
    """The numbers in a handle of the interpreter."""
    return decode(handle.data, handle.dtype)


def in_bf16(values: Array) -> TensorHandle:
    return TensorHandle(_encode_bf16(values, False), tl.bfloat16)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _convert_float(data: Array, source: tl.dtype, target: tl.dtype, rounding: Any) -> Array:
    """Replaces the stock conversion between floating-point types."""
    known = (tl.float16, tl.float32, tl.float64, *ENCODED)
    toward_zero = rounding == ir.ROUNDING_MODE.RTZ
    if source not in known or target not in known or (toward_zero and target != tl.bfloat16):
        raise TypeError(f"no conversion from {source} to {target} in rounding mode {rounding}")
    return encode(decode(data, source), target, toward_zero)


def _e4m3_bits(codes: Array) -> Array:
    wide = codes.astype(np.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).view(np.float16)


def _halves(pairs: Array, value: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The `value` of the low and of the high byte of int16 pairs, in float16."""
    bits = pairs.view(np.uint16)
    low, high = (value(x.astype(np.uint8)) for x in (bits & 0xFF, bits >> 8))
    return low.astype(np.float16), high.astype(np.float16)


# Inline assembly of the kernels, by its text: what it makes of the data of its one argument.
ASSEMBLY: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    _kv_codes.E4M3.value: lambda x: _halves(x, lambda b: FP8_VALUES[tl.float8e4nv][b]),
    _kv_codes.E4M3_BITS.value: lambda x: _halves(x, _e4m3_bits),
    _kv_codes.INT8.value: lambda x: _halves(x, lambda b: b.view(np.int8)),
}


def fma_pairs(dtype: tl.dtype) -> Callable[..., Array]:
    """a · b + c of pairs of 16-bit numbers in 32 bits, rounded once."""

    def halves(x: Array) -> Array:
        return decode(np.stack([x & 0xFFFF, x >> 16]).astype(np.uint16).view(stored), dtype)

    def fma(a: Array, b: Array, c: Array) -> Array:
        exact = halves(a).astype(np.float64) * halves(b) + halves(c)
        low, high = encode(exact.astype(np.float32), dtype).view(np.uint16).astype(np.uint32)
        return low | high << 16

    stored = np.uint16 if dtype == tl.bfloat16 else np.float16
    return fma


# Inline assembly of one instruction on 32-bit registers, by what it starts with.
INSTRUCTIONS: dict[str, Callable[..., Array]] = {
    "fma.rn.f16x2 ": fma_pairs(tl.float16),
    "fma.rn.bf16x2 ": fma_pairs(tl.bfloat16),
    **assembly.INSTRUCTIONS,
}


class Corrected(stock.InterpreterBuilder):
    """The interpreter's operations.

    `memory` holds the (start, end) addresses that may be touched; `waits` is whether the program at
    hand has yet to wait for earlier kernels, as `dependent` launches must; `late` is what they bring.
    """

    memory: list[tuple[int, int]] | None
    dependent: bool
    waits: bool
    late: list[tuple[torch.Tensor, torch.Tensor]]

    # Dependent launch.

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        self.check_waited("ended")
        super().set_grid_idx(x, y, z)
        self.waits = self.dependent
        for tensor, _ in self.late if self.dependent else ():
            tensor.fill_(torch.nan)

    def check_waited(self, action: str) -> None:
        if self.waits:
            self.waits = False
            raise RuntimeError(f"program {self.grid_idx} {action} before gdc_wait")

    def gdc_wait(self) -> None:
        self.waits = False
        for tensor, values in self.late:
            tensor.copy_(values)

    # Arithmetic: on numbers, not on the integers that store them.

    def unary_op(self, x: TensorHandle, op: Any) -> TensorHandle:
        return in_bf16(op(number(x))) if is_bf16(x) else super().unary_op(x, op)

    def binary_op(self, x: TensorHandle, y: TensorHandle, op: Any) -> TensorHandle:
        if not is_bf16(x):
            plain = super().binary_op(x, y, op)
            # stock gives the outcome of a comparison the type of what was compared
            return TensorHandle(plain.data, tl.int1) if plain.data.dtype == np.bool_ else plain
        result = op(number(x), number(y))
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else in_bf16(result)

    def ternary_op(
        self, x: TensorHandle, y: TensorHandle, z: TensorHandle, op: Any
    ) -> TensorHandle:
        if op is np.where or not is_bf16(z):
            return super().ternary_op(x, y, z, op)
        return in_bf16(op(number(x), number(y), number(z)))

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        product = number(x).astype(np.float64) * number(y)  # exact, so the sum is rounded once
        return TensorHandle(encode((product + number(z)), z.dtype), z.dtype.scalar)

    def create_erf(self, x: TensorHandle) -> TensorHandle:
        return TensorHandle(erf(x.data), x.dtype.scalar)

    def get_bf16(self, value: float) -> TensorHandle:
        return in_bf16(np.array([value], np.float32))

    def cast_impl(self, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if x.dtype.scalar not in ENCODED and dtype.scalar not in ENCODED:
            return super().cast_impl(x, dtype)
        return TensorHandle(encode(number(x), dtype), dtype.scalar)

    def create_dot(
        self, x: TensorHandle, y: TensorHandle, acc: TensorHandle, precision: Any, imprecise: Any
    ) -> TensorHandle:
        a, b = number(x), number(y)
        # float64 is exact on integers, and goes through BLAS; fp16 products are exact in float32.
        wide = np.float64 if a.dtype.kind in "iu" else np.promote_types(a.dtype, np.float32)
        product = np.matmul(a.astype(wide), b.astype(wide))
        return TensorHandle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)

    def create_extern_elementwise(
        self, library: str, path: str, symbol: str, args: Any, result: tl.dtype, pure: bool
    ) -> TensorHandle:
        name = symbol.removeprefix("__nv_")
        function = LIBDEVICE.get(name) or LIBDEVICE.get(name.removesuffix("f"))
        if function is None:
            raise KeyError(f"add {symbol} to LIBDEVICE in {__file__}")
        return TensorHandle(encode(function(*map(number, args)), result), result.scalar)

    def create_inline_asm(self, asm: str, constraints: str, args: Any, *_: Any) -> Any:
        if asm in ASSEMBLY:
            results = [TensorHandle(x, tl.float16) for x in ASSEMBLY[asm](args[0].data)]
            return SimpleNamespace(get_result=lambda i: results[i])
        for start, function in INSTRUCTIONS.items():
            if asm.startswith(start):
                bits = function(*(np.asarray(x.data).view(np.uint32) for x in args))
                result = TensorHandle(bits.view(np.int32), tl.int32)
                return SimpleNamespace(get_result=lambda i, result=result: result)
        if not asm.startswith("prefetch"):
            raise NotImplementedError(f"inline assembly {asm!r}")
        addresses = args[0].data.astype(np.uint64)
        self.check(TensorHandle(addresses, tl.pointer_type(tl.int8)), np.ones(1, bool))
        nothing = TensorHandle(np.zeros(addresses.shape, np.int32), tl.int32)
        return SimpleNamespace(get_result=lambda i: nothing)

    # Memory: every address is checked.

    def check(self, pointers: TensorHandle, mask: Array) -> None:
        """Raise IndexError unless all pointers under the mask lie in tensors of the launch."""
        addresses, mask = np.broadcast_arrays(pointers.data, mask)
        addresses = addresses[mask.astype(bool)]
        if self.memory is None or not addresses.size:
            return
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        inside = np.zeros(addresses.shape, bool)
        for start, end in self.memory:
            inside |= (addresses >= np.uint64(start)) & (addresses + size <= np.uint64(end))
        if not inside.all():
            outside = f"{int((~inside).sum())} of {addresses.size} lanes"
            raise IndexError(f"out-of-bounds access in program {self.grid_idx}: {outside}")

    def create_masked_load(
        self, pointers: TensorHandle, mask: TensorHandle, *args: Any, **kwargs: Any
    ) -> TensorHandle:
        self.check(pointers, mask.data)
        return super().create_masked_load(pointers, mask, *args, **kwargs)

    def create_masked_store(
        self, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *args: Any
    ) -> None:
        self.check_waited("wrote")
        self.check(pointers, mask.data)
        return super().create_masked_store(pointers, value, mask, *args)

    def create_atomic_cas(self, pointers: TensorHandle, *args: Any) -> TensorHandle:
        self.check_waited("wrote")
        self.check(pointers, np.ones_like(pointers.data, bool))
        return super().create_atomic_cas(pointers, *args)

    def create_atomic_rmw(
        self, op: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *args: Any
    ) -> TensorHandle:
        self.check_waited("wrote")
        self.check(pointers, mask.data)
        if not (is_bf16(value) and op == ir.ATOMIC_OP.FADD):
            return super().create_atomic_rmw(op, pointers, value, mask, *args)
        return self._add_bf16(pointers, value, mask)

    def _add_bf16(
        self, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle
    ) -> TensorHandle:
        """Add lane by lane, since lanes may name the same address."""
        broadcast = np.broadcast_arrays(pointers.data, value.data, mask.data)
        addresses, values, lanes = (np.ravel(x) for x in broadcast)
        before = np.zeros(addresses.shape, np.uint16)
        one, zero = np.ones(1, bool), np.zeros(1, np.uint16)
        for i in np.flatnonzero(lanes):
            address = np.ascontiguousarray(addresses[i : i + 1])
            old = stock._interpreter.load(address, one, zero, np.dtype(np.uint16))
            total = decode(old, tl.bfloat16) + decode(values[i : i + 1], tl.bfloat16)
            stock._interpreter.store(address, _encode_bf16(total, False), one)
            before[i] = old[0]
        return TensorHandle(before.reshape(np.shape(pointers.data)), tl.bfloat16)


# The reductions and scans that the stock interpreter hands to NumPy as a whole.
WHOLE = {"_sum_combine", "_prod_combine", "_elementwise_max", "_elementwise_min"} | {
    f"_arg{which}_combine_tie_break_{tie}" for which in ("min", "max") for tie in ("left", "fast")
}


def _reduce_in_float32(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Let a reduction or scan of bf16 see numbers; its result is rounded once."""

    def apply_impl(self: Any, inputs: tuple[tl.tensor, ...]) -> Any:
        bf16 = any(x.dtype == tl.bfloat16 for x in inputs)
        if not bf16 or self.combine_fn.__name__ not in WHOLE:
            return apply(self, inputs)
        wide = tuple(
            self.to_tensor(number(x.handle), tl.float32) if x.dtype == tl.bfloat16 else x
            for x in inputs
        )
        result = apply(self, wide)
        if isinstance(result, list | tuple):
            return tuple(narrow(self, x) for x in result)
        return narrow(self, result)

    def narrow(self: Any, x: tl.tensor) -> tl.tensor:
        if x.dtype != tl.float32:
            return x  # the index of an argmax
        stored = _encode_bf16(x.handle.data, False)
        return self.to_tensor(stored if x.shape else stored[0], tl.bfloat16)

    return apply_impl


def _implicit_conversion(arg: Any, convert: Callable[[Any], Any] = stock._implicit_cvt) -> Any:
    """Stock Triton 3.6 and 3.7 refuse Python's bools as arguments of a kernel."""
    if isinstance(arg, bool):
        return tl.tensor(TensorHandle(np.array([arg]), tl.int1), tl.int1)
    return convert(arg)


def _interpreted(kernel: JITFunction[Any]) -> InterpretedFunction:
    """The interpreted form of a kernel, made once; kept on it, since hashing one reads its source."""
    attributes = vars(kernel)
    if "interpreted" not in attributes:
        attributes["interpreted"] = InterpretedFunction(kernel.fn)
    return attributes["interpreted"]


def _storages(values: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """The (start, end) addresses of all tensors in `values`, those in tuples and descriptors too."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _storages(value)
        elif isinstance(tensor := getattr(value, "base", value), torch.Tensor):
            storage = tensor.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _bound(member: Callable[..., Any]) -> Callable[..., Any]:
    """A builtin of the language that knows the interpreter."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return member(*args, **{**kwargs, "_semantic": stock.interpreter_semantic})

    return call


class _NoScope:
    def restore(self) -> None:
        """The language stays patched until the block ends."""


def _patch_language(put: Callable[[Any, str, Any], None], scope: Any) -> None:
    """Patch the language once a block; stock does it at every call of a device function."""
    for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):
        for name, member in inspect.getmembers(package):
            if tl.core.is_builtin(member):
                put(package, name, _bound(member))
    stock._patch_lang_tensor(tl.tensor, scope)
    stock._patch_lang_core(tl, scope)
    stock._patch_lang_core(tl.core, scope)
    put(stock, "_patch_lang", lambda fn: _NoScope())
    # Triton 3.6 beside NumPy 2.4: a one-element array is no index.
    put(tl.tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(())))
    for name, member in list(vars(tl.tensor).items()):
        if isinstance(member, JITFunction):  # x.sum(), x.max(): an object does not bind self
            put(tl.tensor, name, lambda *args, _member=member, **kwargs: _member(*args, **kwargs))
    for name, member in inspect.getmembers(cuda_libdevice, callable):
        if hasattr(libdevice, name) and not name.startswith("_"):
            put(libdevice, name, _bound(member))
            put(cuda_libdevice, name, _bound(member))
    put(cuda, "gdc_launch_dependents", lambda: None)
    put(cuda, "gdc_wait", lambda: stock.interpreter_builder.gdc_wait())


def _patch_builder(put: Callable[[Any, str, Any], None], sm: int) -> None:
    builder = stock.interpreter_builder
    put(builder, "__class__", Corrected)
    for name, value in (("memory", None), ("dependent", False), ("waits", False), ("late", [])):
        put(builder, name, value)
    smallest = min_dot_size(GPUTarget("cuda", sm, 32))  # stock takes dots of any size
    put(builder, "codegen_fns", {**builder.codegen_fns, "min_dot_size": smallest})
    put(stock, "_convert_float", _convert_float)
    put(stock, "_implicit_cvt", _implicit_conversion)
    for operations in (stock.ReduceOps, stock.ScanOps):
        put(operations, "apply_impl", _reduce_in_float32(operations.apply_impl))


def _launcher(check_bounds: bool, allow: Sequence[torch.Tensor]) -> Callable[..., None]:
    """What `kernel[grid](...)` calls."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        builder = stock.interpreter_builder
        if check_bounds:
            tensors = [*args, *kwargs.values(), *allow]
            builder.memory = list(_storages(tensors))
        builder.dependent, builder.waits = kwargs.get("launch_pdl", False), False
        with np.errstate(all="ignore"):  # a GPU makes its infinities and NaNs in silence
            _interpreted(self).run(*args, grid=grid, warmup=warmup, **kwargs)
        builder.check_waited("ended")

    return run


@contextlib.contextmanager
def interpret(
    sm: int = 90, check_bounds: bool = True, allow: Sequence[torch.Tensor] = ()
) -> Iterator[None]:
    """Launch kernels on CPU tensors in the interpreter, as on capability `sm`.

    An access outside of the tensors of the launch is an IndexError with the program's id (inside of
    Triton's InterpreterError). `allow` names tensors that are reached through pointers in memory.
    In a block within a block only `sm` counts.
    """
    if isinstance(stock.interpreter_builder, Corrected):
        with kernels_on_cpu(sm):
            yield
        return
    scope = stock._LangPatchScope()
    try:
        _patch_language(scope.set_attr, scope)
        _patch_builder(scope.set_attr, sm)
        scope.set_attr(JITFunction, "run", _launcher(check_bounds, allow))
        scope.set_attr(JITFunction, "__call__", lambda self, *a, **k: _interpreted(self)(*a, **k))
        scope.set_attr(triton.knobs.runtime, "interpret", True)
        with kernels_on_cpu(sm):
            yield
    finally:
        scope.restore()


@contextlib.contextmanager
def late(*tensors: torch.Tensor) -> Iterator[None]:
    """In an `interpret` block: programs launched dependently find `tensors` NaN until they wait."""
    builder = stock.interpreter_builder
    builder.late = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, values in builder.late:
            tensor.copy_(values)
        builder.late = []
