"""Run @triton.jit kernels on CPU tensors WITHOUT TRITON_INTERPRET.   with interpret(): kernel[grid](...)
Fixes the stock interpreter's bf16/fp8/libdevice/dot_scaled; outside the block the same objects compile (AOT or GPU). Triton 3.6-3.9."""
import contextlib, inspect
from tlk.kernels._op import kernels_on_cpu
import numpy as np, torch, triton, triton.language as tl
from triton.runtime import interpreter as ti
from triton.runtime.jit import JITFunction
from triton.runtime.autotuner import Autotuner
from triton._C.libtriton import ir as _ir
from triton.language.extra import libdevice as _ld
from triton.language.extra.cuda import libdevice as _cld
f32, u8, BF, TH, B = np.float32, np.uint8, tl.bfloat16, ti.TensorHandle, ti.InterpreterBuilder
# ---- number formats
_LUT = {d: torch.arange(256, dtype=torch.uint8).view(t).float().numpy() for d, t in ((tl.float8e4nv, torch.float8_e4m3fn), (tl.float8e5, torch.float8_e5m2))}
_MAXC = {tl.float8e4nv: 0x7E, tl.float8e5: 0x7B}
_E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], f32)
def _enc_fp8(x, dt):                      # RTNE + satfinite like cvt.rn.satfinite.*; NaN -> 0x7F
    x = np.asarray(x, f32); v = _LUT[dt][:_MAXC[dt] + 1]; mid = (v[1:] + v[:-1]) / 2; a = np.abs(x)
    lo, hi = np.searchsorted(mid, a, 'left'), np.searchsorted(mid, a, 'right'); c = np.where((lo == hi) | (lo % 2 == 0), lo, hi).astype(u8)
    return np.where(np.isnan(x), u8(0x7F), c | (np.signbit(x).astype(u8) << 7)).astype(u8)
def _enc_bf16(x, rtz=False):
    x = np.ascontiguousarray(x, dtype=f32).reshape(np.shape(x)); u = x.view(np.uint32)
    r = u >> 16 if rtz else (u + (((u >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FFF), r.astype(np.uint16)).astype(np.uint16)
def _dec(data, dt):                       # storage (uint16/uint8) -> real values
    if dt.scalar == BF: return (np.asarray(data).astype(np.uint32) << 16).view(f32)
    return _LUT[dt.scalar][np.asarray(data).view(u8)] if dt.scalar in _LUT else data
def _enc(x, dt, rtz=False):
    if dt.scalar == BF: return _enc_bf16(x, rtz)
    if dt.scalar in _LUT: return _enc_fp8(x, dt.scalar)
    with np.errstate(over='ignore', invalid='ignore'): return np.asarray(x).astype(ti._get_np_dtype(dt.scalar))
_orig_convert = ti._convert_float
def _convert_float(data, src, dst, mode):
    known = lambda d: d in (BF, tl.float16, tl.float32, tl.float64) or d in _LUT; rtz = mode is not None and mode == _ir.ROUNDING_MODE.RTZ
    return _enc(_dec(data, src), dst, rtz) if known(src) and known(dst) and not (rtz and dst != BF) else _orig_convert(data, src, dst, mode)
isbf = lambda h: h.dtype.scalar == BF
val = lambda h: _dec(h.data, h.dtype)
erf = lambda x: torch.erf(torch.from_numpy(np.array(x))).numpy()
# ---- builder overrides
_o = {n: getattr(B, n) for n in 'cast_impl binary_op ternary_op unary_op create_fma create_masked_load create_masked_store create_atomic_rmw create_atomic_cas'.split()}
def binary_op(self, l, r, op):
    if not isbf(l): return _o['binary_op'](self, l, r, op)
    out = op(val(l), val(r)); return TH(out, tl.int1) if out.dtype == np.bool_ else TH(_enc_bf16(out), BF)
def unary_op(self, a, op): return TH(_enc_bf16(op(val(a))), BF) if isbf(a) else _o['unary_op'](self, a, op)
def ternary_op(self, a, b, c, op): return _o['ternary_op'](self, a, b, c, op) if op is np.where or not isbf(c) else TH(_enc_bf16(op(val(a), val(b), val(c))), BF)
def cast_impl(self, src, dst):            # stock: int <-> bf16 copies the raw uint16
    s, d = src.dtype.scalar, dst.scalar
    return TH(_enc(val(src), d), d) if s in (BF, *_LUT) or d in (BF, *_LUT) else _o['cast_impl'](self, src, dst)
def create_fma(self, x, y, z): return TH(_enc_bf16(val(x) * val(y) + val(z)), BF) if isbf(z) else _o['create_fma'](self, x, y, z)
def create_erf(self, a): return TH(erf(a.data), a.dtype.scalar)
def get_bf16(self, v): return TH(_enc_bf16(np.array([v], f32)), BF)
EMULATE_TF32 = False                      # True: round fp32 tl.dot inputs to tf32 (the GPU default)
def _tf32(x): u = np.ascontiguousarray(x).view(np.uint32); return ((u + 0xFFF + ((u >> 13) & 1)) & np.uint32(0xFFFFE000)).view(f32)
def create_dot(self, a, b, d, prec, _):
    x, y, dt = val(a), val(b), d.data.dtype
    if x.dtype.kind in 'iu': return TH(np.matmul(x.astype(np.float64), y.astype(np.float64)).astype(dt) + d.data, d.dtype.scalar)   # BLAS, exact
    if x.dtype == np.float16: x, y = x.astype(f32), y.astype(f32)
    elif EMULATE_TF32 and a.dtype.scalar == tl.float32 and prec == _ir.INPUT_PRECISION.TF32: x, y = _tf32(x), _tf32(y)
    with np.errstate(invalid='ignore'): return TH((np.matmul(x, y) + d.data).astype(dt), d.dtype.scalar)
def create_dot_scaled(self, l, ls, lf, r, rs, rf, fast, lkp, rkp, *acc):
    def opnd(h, s, f, kp, rhs):
        v = val(h)
        if f == _ir.ScaleDotElemTypeTY.E2M1:
            ax = (-2 if kp else -1) if rhs else (-1 if kp else -2); p = np.moveaxis(h.data.view(u8), ax, -1)
            v = np.moveaxis(np.stack([_E2M1[p & 15], _E2M1[p >> 4]], -1).reshape(*p.shape[:-1], -1), -1, ax)
        if s is None: return v.astype(f32)
        e = s.data.view(u8); sc = _LUT[tl.float8e4nv][e] if s.dtype.scalar == tl.float8e4nv else np.where(e == 255, np.nan, np.exp2(e.astype(np.float64) - 127)).astype(f32)
        sc = np.repeat(sc, v.shape[-2 if rhs else -1] // sc.shape[-1], -1); return v.astype(f32) * (np.swapaxes(sc, -1, -2) if rhs else sc)
    return TH(np.matmul(opnd(l, ls, lf, lkp, False), opnd(r, rs, rf, rkp, True)) + acc[-1].data, tl.float32)
_NV = dict(tanh=np.tanh, fast_tanh=np.tanh, exp=np.exp, fast_exp=np.exp, exp2=np.exp2, exp10=lambda x: 10. ** x, log=np.log, fast_log=np.log, log2=np.log2, log1p=np.log1p, expm1=np.expm1, sqrt=np.sqrt,
           rsqrt=lambda x: 1 / np.sqrt(x), pow=np.power, fabs=np.abs, floor=np.floor, ceil=np.ceil, rint=np.rint, nearbyint=np.rint, trunc=np.trunc, round=lambda x: np.trunc(x + np.copysign(.5, x)), erf=erf,
           sin=np.sin, cos=np.cos, atan=np.arctan, isnan=np.isnan, isinf=np.isinf, fmod=np.fmod, copysign=np.copysign, fmax=np.fmax, fmin=np.fmin, fdiv_rn=np.divide, fast_fdividef=np.divide)
def create_extern_elementwise(self, lib, path, symbol, args, ret, pure):
    n = symbol.removeprefix('__nv_'); f = _NV.get(n) or _NV.get(n.removesuffix('f'))
    if f is None: raise NotImplementedError(f'add {symbol} to _NV')
    return TH(np.asarray(f(*map(val, args))).astype(ti._get_np_dtype(ret)), ret.scalar)
ASM_EMU = {}                              # inline asm string -> fn(*numpy arrays) -> array or tuple of arrays
def create_inline_asm(self, asm, constraints, values, types, pure, pack):
    if asm not in ASM_EMU: raise NotImplementedError('register ASM_EMU[asm] for: ' + asm)
    out = ASM_EMU[asm](*[v.data for v in values]); hs = [TH(np.asarray(o).astype(ti._get_np_dtype(t)), t.scalar) for o, t in zip(out if isinstance(out, tuple) else (out,), types)]
    return type('Call', (), {'get_result': lambda self, i: hs[i]})()
def create_atomic_rmw(self, op, ptr, v, mask, sem, scope):
    _chk(self, ptr, mask)
    if not (isbf(v) and op == _ir.ATOMIC_OP.FADD): return _o['create_atomic_rmw'](self, op, ptr, v, mask, sem, scope)
    p, w, m = (np.ravel(x) for x in np.broadcast_arrays(ptr.data, v.data, mask.data)); old = np.zeros(p.shape, np.uint16); t = np.ones(1, bool)
    for i in np.flatnonzero(m):
        q = np.ascontiguousarray(p[i:i + 1]); old[i:i + 1] = ti._interpreter.load(q, t, np.zeros(1, np.uint16), np.dtype(np.uint16))
        ti._interpreter.store(q, _enc_bf16(_dec(old[i:i + 1], BF) + _dec(w[i:i + 1], BF)), t)
    return TH(old.reshape(np.shape(ptr.data)), BF)
# ---- out-of-bounds checker (stock interpreter dereferences raw pointers: SIGSEGV or silent garbage)
_ranges, _extra, CHECK_BOUNDS = [], (), True
def _chk(self, ptr, mask):
    if not CHECK_BOUNDS: return
    p, m = np.broadcast_arrays(ptr.data, mask.data); p = p[m.astype(bool)]
    if p.size:
        n = np.uint64(max(1, ptr.get_element_ty().primitive_bitwidth // 8)); ok = np.zeros(p.shape, bool)
        for lo, hi in _ranges: ok |= (p >= lo) & (p + n <= hi)
        if not ok.all(): raise IndexError(f'out-of-bounds access in program {self.grid_idx}: {int((~ok).sum())} of {p.size} lanes')
def create_masked_load(self, p, m, *a, **k): _chk(self, p, m); return _o['create_masked_load'](self, p, m, *a, **k)
def create_masked_store(self, p, v, m, *a, **k): _chk(self, p, m); return _o['create_masked_store'](self, p, v, m, *a, **k)
def create_atomic_cas(self, p, *a): _chk(self, p, TH(np.ones_like(p.data, dtype=bool), tl.int1)); return _o['create_atomic_cas'](self, p, *a)
_BUILDER = {n: f for n, f in globals().items() if inspect.isfunction(f) and (n.startswith('create_') or n in ('cast_impl', 'binary_op', 'unary_op', 'ternary_op', 'get_bf16'))}
# ---- run-time switch
_impl0, _hst0 = ti._implicit_cvt, ti.GridExecutor._init_args_hst
def _interp(jf):                          # never hash a JITFunction here: hash() walks (patched) dependencies
    if '_tlk' not in jf.__dict__: jf.__dict__['_tlk'] = ti.InterpretedFunction(jf.fn)
    return jf.__dict__['_tlk']
def _implicit_cvt(x): return tl.tensor(TH(np.array([x]), tl.int1), tl.int1) if isinstance(x, bool) else _impl0(x)
def _tensors(x):
    for i in x:
        if isinstance(i, (tuple, list)): yield from _tensors(i)
        elif hasattr(i, 'untyped_storage'): yield i
        elif hasattr(getattr(i, 'base', None), 'untyped_storage'): yield i.base      # TensorDescriptor, reinterpret()
def _init_args_hst(self, args, kwargs):
    out = _hst0(self, args, kwargs); _ranges.clear()
    for t in _tensors([*out[0], *out[1].values(), *_extra]): s = t.untyped_storage(); _ranges.append((np.uint64(s.data_ptr()), np.uint64(s.data_ptr() + s.nbytes())))
    return out
_FAST = {'_sum_combine', '_prod_combine', '_elementwise_max', '_elementwise_min'} | {f'_arg{m}_combine_tie_break_{t}' for m in ('min', 'max') for t in ('left', 'fast')}
def _promote(orig):                       # stock fast paths of tl.sum/max/argmax/cumsum reduce raw uint16 for bf16
    def apply_impl(self, inp):
        if not any(t.dtype == BF for t in inp) or self.combine_fn.__name__ not in _FAST: return orig(self, inp)
        out = orig(self, tuple(self.to_tensor(val(t.handle), tl.float32) if t.dtype == BF else t for t in inp)); many = isinstance(out, (list, tuple))
        out = [self.to_tensor(_enc_bf16(r.handle.data) if r.shape else _enc_bf16(r.handle.data)[0], BF) if r.dtype == tl.float32 else r for r in (out if many else [out])]
        return tuple(out) if many else out[0]
    return apply_impl
_active = False
@contextlib.contextmanager
def interpret(sm=90, check_bounds=True, allow=()):   # allow: tensors reached through pointers stored in memory
    global _active, CHECK_BOUNDS, _extra
    if _active:
        with kernels_on_cpu(sm): yield
        return
    S = ti._LangPatchScope(); put = S.set_attr; sem = ti.interpreter_semantic; _active, CHECK_BOUNDS, _extra = True, check_bounds, allow
    try:
        put(ti, '_convert_float', _convert_float); put(ti, '_implicit_cvt', _implicit_cvt); put(ti.GridExecutor, '_init_args_hst', _init_args_hst)
        for n, f in _BUILDER.items(): put(B, n, f)
        for c in (ti.ReduceOps, ti.ScanOps): put(c, 'apply_impl', _promote(c.apply_impl))
        bind = lambda m: lambda *a, **k: m(*a, **{**k, '_semantic': sem})
        for pkg in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):      # patched ONCE per block; stock re-patches on every
            for n, m in inspect.getmembers(pkg):                                           # device-function call and leaks patches in tl.core
                if tl.core.is_builtin(m): put(pkg, n, bind(m))
        ti._patch_lang_tensor(tl.tensor, S); ti._patch_lang_core(tl, S); ti._patch_lang_core(tl.core, S)
        put(tl.tensor, '__index__', lambda self: int(np.asarray(self.handle.data).reshape(())))                # numpy >= 2.4 with triton 3.6
        for n, m in list(vars(tl.tensor).items()):
            if isinstance(m, JITFunction): put(tl.tensor, n, (lambda f: lambda *a, **k: f(*a, **k))(m))        # x.sum(), x.max() ...
        if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 8):
            ds, cx = tl.dot_scaled, lambda v: v if isinstance(v, tl.constexpr) else tl.constexpr(v)
            for mod in (tl, tl.core): put(mod, 'dot_scaled', lambda l, ls, lf, r, rs, rf, acc=None, *a, **k: ds(l, ls, cx(lf), r, rs, cx(rf), acc, *a, **k))
        for n, m in inspect.getmembers(_cld, callable):
            if hasattr(_ld, n) and not n.startswith('_'): put(_ld, n, bind(m)); put(_cld, n, bind(m))
        put(ti, '_patch_lang', lambda fn: type('Null', (), {'restore': lambda self: None})())
        put(ti.interpreter_builder, 'codegen_fns', {**ti.interpreter_builder.codegen_fns, 'min_dot_size': lambda l, r: (1, 1, 32 if l.scalar.primitive_bitwidth == 8 else 16)})
        put(JITFunction, 'run', lambda self, *a, grid, warmup=False, **k: _interp(self).run(*a, grid=grid, warmup=warmup, **k))
        put(JITFunction, '__call__', lambda self, *a, **k: _interp(self)(*a, **k))
        put(Autotuner, '_bench', lambda self, *a, config, **k: [float(self.configs.index(config))] * 3)        # first config wins, nothing is timed
        put(triton.knobs.runtime, 'interpret', True)
        with np.errstate(over="ignore"), kernels_on_cpu(sm): yield   # a GPU overflows to infinity in silence
    finally: S.restore(); _active = False; triton.knobs.runtime.interpret = False
