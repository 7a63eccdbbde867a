"""A tensor as a list of rows, read where it lies if two strides can say where that is."""

from torch import Tensor


def as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return `x` [..., N], `inner`, `outer_stride` and `inner_stride`.

    Row r starts at element r // inner * outer_stride + r % inner * inner_stride. A slice of heads
    [T, H, D] out of wider rows fits as it is; what needs a third stride is copied.
    """
    n = x.shape[-1]
    if x.is_contiguous():
        return x, 1, n, 0
    groups: list[
        tuple[int, int]
    ] = []  # (size, stride) of what remains after merging, innermost first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        else:
            groups.append((size, stride))
    if (x.stride(-1) != 1 and n > 1) or len(groups) > 2:
        return x.contiguous(), 1, n, 0
    if len(groups) == 2:
        return x, groups[0][0], groups[1][1], groups[0][1]
    return x, 1, groups[0][1] if groups else n, 0
