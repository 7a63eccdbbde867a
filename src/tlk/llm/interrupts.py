"""Ctrl-C between two steps of the engine and not in the middle of one, which would tear its state."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether Ctrl-C was pressed; a second time, it no longer waits."""

    def __init__(self) -> None:
        self._pressed = False

    def let_through(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed since."""
        if self._pressed:
            self._pressed = False
            raise KeyboardInterrupt

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True


@contextmanager
def held_interrupts() -> Iterator[Interrupts]:
    """Hold a first Ctrl-C back until `let_through` or the end of the context.

    Where Ctrl-C means something else than KeyboardInterrupt, or in another thread than the main one,
    which it does not reach, nothing changes.
    """
    interrupts = Interrupts()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts._press)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.let_through()
