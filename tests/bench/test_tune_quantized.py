from tlk.bench.tune_calls import CALLS
from tlk.bench.tune_keys import Projection


def test_dims_of_quantized_weights_tell_their_groups():
    layer = Projection(256, 512)
    assert CALLS["dequant_mm.int4"].dims(layer) == (256, 512, 128)
    assert CALLS["dequant_mm.int8"].dims(layer) == (256, 512, 512)
    assert CALLS["dequant_mm.nv4"].dims(layer) == (256, 512, 16)
    assert CALLS["scaled_mm.fp8"].dims(layer) == (256, 512)
    assert CALLS["dequant_mm.int4"].dims(Projection(256, 96)) is None  # no whole groups
