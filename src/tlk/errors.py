"""Every exception tlk raises on purpose, besides ValueError and TypeError for a bad argument."""


class TlkError(Exception):
    """Base class: `except tlk.TlkError` catches all of them and nothing else."""


class UnsupportedError(TlkError, NotImplementedError):
    """This model, dtype, shape or GPU has no kernel; the message names what does."""


class CheckpointError(TlkError, ValueError):
    """A checkpoint is corrupt, incomplete or of another model; the message lists the keys."""


class CapacityError(TlkError, RuntimeError):
    """A request does not fit the memory or the limits it was given."""


class EngineError(TlkError, RuntimeError):
    """The engine failed a request, or has ended; `__cause__` says why."""


class FallbackWarning(UserWarning):
    """A part of a model runs on PyTorch instead of tlk's kernels; the message says why."""


class UncalibratedWarning(UserWarning):
    """An 8-bit cache has scales that nobody measured; the message says of how many layers."""
