"""Arithmetic of launchers. Triton's own pass through a wrapper that takes 1.7 µs a call, and a decode
step of a 32-layer model makes some 600 of them (triton 3.7.1, CPU)."""


def cdiv(a: int, b: int) -> int:
    """a / b for b > 0, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()
