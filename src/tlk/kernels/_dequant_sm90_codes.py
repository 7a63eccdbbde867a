"""From a tile of codes in shared memory to the left operands of wgmma, for _dequant_sm90.py.

A lane of a wgmma's left operand holds neighbours of a row: of each 8 values its two. It reads the whole
row, 64 bytes, and of each run of 8 bytes one byte permute takes its two, spread to 16 bits: no value is
moved to another lane, and x is used as it lies.

A step is 64 bytes of 4-bit codes, or twice 64 of 8-bit ones, and has two operands of 64 values:

- groups of 64 bytes or more, and whole rows: the low codes, and the high ones;
- smaller groups: low and high codes of the first 32 bytes, and of the last;
- 8-bit codes: the first 64, and the last.

FLAGS, here and in _dequant_sm90.py: kind, bytes of a group (0 for whole rows), whether the kernel before
writes the scales, activation, gated, and whether there are zero points, a bias, a residual.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tlk.kernels._dequant import _e4m3
from tlk.kernels._dequant_pairs import _number_pair, _scale_pair
from tlk.kernels._dequant_ptx import OFFSETS, TABLE_PTX, decode_ptx
from tlk.kernels._linear import _weight_rows

ROWS = gl.constexpr(64)  # of W: those of an instruction
_TABLE_PTX = gl.constexpr(TABLE_PTX)
# rows and words; every lane of four has the same
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [64, 16],
    )
)  # fmt: skip


@gluon.constexpr_function
def units(runs):
    """Rows, runs of 8 bytes, and the four lanes that take two bytes each."""
    registers = [[0, 2**i, 0] for i in range(runs.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [*registers, [8, 0, 0]], [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [64, runs, 4],
    )  # fmt: skip


@gluon.constexpr_function
def _grouped(groups, runs):
    """Rows, groups and the runs of each, where lanes have them in `units`."""
    registers = [[0, 0, 2**i] for i in range((runs // groups).bit_length() - 1)]
    registers += [[0, 2**i, 0] for i in range(groups.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [*registers, [8, 0, 0]], [[0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [64, groups, runs // groups],
    )  # fmt: skip


@gluon.constexpr_function
def runs_of(flags):
    """Runs of bytes under the codes of an operand."""
    return 4 if flags[0] not in ("int8", "fp8") and 0 < flags[1] < 64 else 8


@gluon.constexpr_function
def two_sources(flags):
    """Whether the operands of a step have codes and scales of their own."""
    return flags[0] in ("int8", "fp8") or 0 < flags[1] < 64


@gluon.constexpr_function
def _offset(kind, half):
    return OFFSETS[kind, half]


@gluon.jit
def columns(first, L: gl.constexpr):
    """Columns of y, of a program's tile that starts at `first`, for rows of W in layout L, as the tile lies."""
    r = gl.arange(0, ROWS, L)
    return first + r // 16 * 16 + r % 8 * 2 + r // 8 % 2


@gluon.jit
def stored_scales(
    scale_ptr, zero_ptr, first, at, N, width, groups, PART: gl.constexpr, FLAGS: gl.constexpr
):  # fmt: skip
    """Scales and zero points of operand PART of the step at byte `at`, as they are stored."""
    KIND: gl.constexpr = FLAGS[0]
    GROUP: gl.constexpr = FLAGS[1]
    RUNS: gl.constexpr = runs_of(FLAGS)
    GROUPS: gl.constexpr = RUNS * 8 // GROUP if GROUP > 0 and GROUP < RUNS * 8 else 1
    L: gl.constexpr = gl.SliceLayout(2, _grouped(GROUPS, RUNS))
    GATED: gl.constexpr = FLAGS[4]
    row = _weight_rows(columns(first, gl.SliceLayout(1, L)), N, GATED).to(gl.int64)[:, None]
    byte = at + RUNS * 8 * PART if two_sources(FLAGS) else at
    group = gl.arange(0, GROUPS, gl.SliceLayout(0, L))[None, :]
    inside = byte + group * GROUP < width
    stored = 0
    zero = 0
    if GROUP > 0:
        group += byte // GROUP
        scale_row = row // 128 if KIND == "fp8" else row
        stored = gl.load(scale_ptr + scale_row * groups + group, mask=inside, other=0)
    if FLAGS[5]:
        zero = gl.load(zero_ptr + row * groups + group, mask=inside, other=0)
    return stored, zero


@gluon.jit
def _spread(pairs, RUNS: gl.constexpr):
    """Pairs [rows, groups] for each run [rows, runs, 1]."""
    GROUPS: gl.constexpr = pairs.shape[1]
    if GROUPS > 1:
        zeros = gl.zeros((ROWS, GROUPS, RUNS // GROUPS), gl.int32, _grouped(GROUPS, RUNS))
        pairs = gl.reshape(gl.expand_dims(pairs, 2) + zeros, (ROWS, RUNS))
    pairs = gl.convert_layout(pairs, gl.SliceLayout(2, units(RUNS)), assert_trivial=True)
    return gl.expand_dims(pairs, 2)


@gluon.jit
def scale_pairs(stored, zero, FLAGS: gl.constexpr, DTYPE: gl.constexpr):
    """Pairs of scales and of what zero points add, for each run; 0 for what there is not."""
    KIND: gl.constexpr = FLAGS[0]
    factor = 0
    minus = 0
    if FLAGS[1] > 0:
        if KIND == "nv4":
            factor = _number_pair(_e4m3(stored.to(gl.int32)), DTYPE)
        else:
            factor = _scale_pair(stored, KIND, DTYPE)
        factor = _spread(factor, runs_of(FLAGS))
    if FLAGS[5]:
        offset: gl.constexpr = _offset(KIND, gl.float16 == DTYPE)
        minus = _spread(_number_pair(-(zero.to(gl.float32) + offset), DTYPE), runs_of(FLAGS))
    return factor, minus


@gluon.jit
def _picked(memory, KIND: gl.constexpr):
    """Of each run the two bytes that a lane multiplies, 16 bits apart; for a table, side by side."""
    U: gl.constexpr = units(8)
    low, high = gl.split(gl.reshape(memory.load(WORDS), (ROWS, 8, 2)))
    low = gl.convert_layout(low, gl.SliceLayout(2, U), assert_trivial=True)
    high = gl.convert_layout(high, gl.SliceLayout(2, U), assert_trivial=True)
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, U)))
    selector = t * 0x22 + 0x10 if KIND == "table4" else t * 0x2222 + 0x1100
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r",
        [gl.expand_dims(low, 2), gl.expand_dims(high, 2), gl.expand_dims(selector[None, :], 1)],
        gl.int32, True, 1,
    )  # fmt: skip


@gluon.jit
def codes_of(w, stage, INDEX: gl.constexpr, CONSUMERS: gl.constexpr, FLAGS: gl.constexpr):
    """What the operands of a stage are decoded from, which may be the same."""
    KIND: gl.constexpr = FLAGS[0]
    EIGHT: gl.constexpr = KIND == "int8" or KIND == "fp8"
    a = _picked(w.index(stage * (2 if EIGHT else 1) * CONSUMERS + INDEX), KIND)
    if EIGHT:
        return a, _picked(w.index((stage * 2 + 1) * CONSUMERS + INDEX), KIND)
    elif two_sources(FLAGS):
        a, b = gl.split(gl.permute(gl.reshape(a, (ROWS, 2, 4, 4)), (0, 2, 3, 1)))
        a = gl.convert_layout(a, units(4), assert_trivial=True)
        return a, gl.convert_layout(b, units(4), assert_trivial=True)
    else:
        return a, a


@gluon.jit
def _numbers(codes, factor, minus, PLANE: gl.constexpr, FLAGS: gl.constexpr, DTYPE: gl.constexpr):
    """Pairs of codes as numbers, with a last dimension of two."""
    SCALED: gl.constexpr = FLAGS[1] > 0
    asm: gl.constexpr = decode_ptx(FLAGS[0], gl.float16 == DTYPE, PLANE, FLAGS[5], SCALED)
    if FLAGS[5] and SCALED:
        pairs = gl.inline_asm_elementwise(
            asm, "=r,r,r,r", [codes, minus, factor], gl.int32, True, 1
        )
    elif FLAGS[5]:
        pairs = gl.inline_asm_elementwise(asm, "=r,r,r", [codes, minus], gl.int32, True, 1)
    elif SCALED:
        pairs = gl.inline_asm_elementwise(asm, "=r,r,r", [codes, factor], gl.int32, True, 1)
    else:
        pairs = gl.inline_asm_elementwise(asm, "=r,r", [codes], gl.int32, True, 1)
    low = (pairs & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.join(low, (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True))


@gluon.jit
def _planes(codes, table, KIND: gl.constexpr):
    """Where the low codes and the high ones are decoded from."""
    if KIND == "table4":
        t0, t1, t2, t3, t4, t5, t6, t7 = table
        low, high = gl.inline_asm_elementwise(
            _TABLE_PTX, "=r,=r,r,r,r,r,r,r,r,r,r", [codes, t0, t1, t2, t3, t4, t5, t6, t7],
            (gl.int32, gl.int32), True, 1,
        )  # fmt: skip
        return low, high
    else:
        return codes, codes


@gluon.jit
def operand(
    codes, scales, table, PART: gl.constexpr, FLAGS: gl.constexpr, DTYPE: gl.constexpr,
    ACC: gl.constexpr,
):  # fmt: skip
    """Left operand PART of a step from the codes of both and their scales."""
    KIND: gl.constexpr = FLAGS[0]
    factor, minus = scales[PART]
    if KIND == "int8" or KIND == "fp8":
        values = _numbers(codes[PART], factor, minus, 0, FLAGS, DTYPE)
    elif two_sources(FLAGS):
        C: gl.constexpr = FLAGS[1] // 8
        low, high = _planes(codes[PART], table, KIND)
        low = _numbers(low, factor, minus, 0, FLAGS, DTYPE)
        high = _numbers(high, factor, minus, 1, FLAGS, DTYPE)
        values = gl.reshape(gl.join(low, high), (ROWS, 4 // C, C, 4, 2, 2))
        values = gl.permute(values, (0, 1, 5, 2, 3, 4))
    else:
        values = _numbers(_planes(codes[0], table, KIND)[PART], factor, minus, PART, FLAGS, DTYPE)
    values = gl.reshape(values, (ROWS, 64))
    return gl.convert_layout(values, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)
