import pytest

from tests.bench.tuning import BF16, CPU, LAYER, key
from tests.interpreter import interpret
from tlk.bench import tune_time
from tlk.bench.timing import Spread
from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import Key, Projection
from tlk.bench.tune_time import verdict
from tlk.kernels.tunable import TUNABLE


@pytest.mark.parametrize("op", TUNABLE)
@pytest.mark.parametrize("running", [1, 5, 20])
@pytest.mark.parametrize("layer", [LAYER, Projection(64, 128, residual=True)])
def test_every_op_is_called_as_its_layers_do(op, running, layer, monkeypatch):
    """The default and the library pass the check against the reference, on a CPU's interpreter."""
    monkeypatch.setattr(
        tune_time, "time_calls", lambda calls, *_: Spread(len(calls), len(calls), len(calls), 1)
    )
    monkeypatch.setattr(tune_time, "copies", lambda nbytes: 3)
    if CALLS[op].dims(layer) is None:
        pytest.skip("no such layer runs this op")
    at = key(op, running, layer=layer)
    default = TUNABLE[op].default(90, 8, BF16, at.dims, running)
    with interpret(sm=90):
        found = verdict(at, [], default, CPU)
    assert not found.wrong and found.best.us == pytest.approx(3e6)


WIDE = (
    Projection(256, 256, norm=True),
    Projection(256, 256, residual=True),
    Projection(256, 256, norm=True, gated=True),
)


@pytest.mark.parametrize("op", CALLS)
def test_calls_give_what_their_references_say(op):
    """As PyTorch's own ops on a CPU; and compiling them needs the same shapes, of empty tensors."""
    for layer in WIDE:
        if (dims := CALLS[op].dims(layer)) is None:
            continue
        call = CALLS[op].make(Key(op, CALLS[op].dtype or BF16, dims, 5, layer))
        inputs = call.inputs(tune_time.Inputs("cpu", BF16))
        empty = call.inputs(tune_time.Inputs("cpu", BF16, empty=True))
        assert [t is None or (t.shape, t.dtype) for t in inputs] == [
            t is None or (t.shape, t.dtype) for t in empty
        ]
        expected = call.reference(*tune_time._copied(inputs))
        actual = call.run(*inputs)
        assert actual.dtype == BF16 and tune_time._equal(actual, expected, 2**-5)
    assert op.startswith(("norm", "gated")) or CALLS[op].dims(WIDE[1]) is not None
