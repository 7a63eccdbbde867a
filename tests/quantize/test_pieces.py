import pytest
import torch

from tests.models.zoo import tiny
from tests.quantize.tiny import FIELDS, data
from tlk.hf.partial import Partial
from tlk.hf.streaming import stream
from tlk.quant.config import QuantConfig
from tlk.quantize.pieces import Pieces
from tlk.quantize.plan import plan
from tlk.quantize.run import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama", **(FIELDS | {"num_key_value_heads": 4})).to(torch.bfloat16).save_pretrained(path)
    return path


def job(found, tmp_path, config, calibrated=True):
    planned = plan(found.decoder, found.sources, config)
    return Pieces(found, planned, Partial(tmp_path / "p", {}), CPU, calibrated)


def work(pieces, layers=None, **options):
    """Run until `layers` are done."""

    def load(i):
        if layers is not None and i >= layers:
            raise InterruptedError
        return pieces.load(i)

    found = pieces.source
    found.load("embedding", "cpu")
    ids = data() if pieces.calibrated else None
    return run(
        found.decoder, pieces.plan, ids, CPU, load=load, done=pieces.done, progress=False, **options
    )


def check_kept_mlp(dense, found):
    """gate stays as it was, and a row of up takes one factor, if there was data to find it."""
    gate, up = (f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up"))
    assert torch.equal(dense[gate], found.tensor(gate))
    factors = dense[up].float() / found.tensor(up).float()
    assert torch.allclose(factors, factors.mean(1, keepdim=True), rtol=0.02)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("ignore", [(), ("lm_head", "re:.*gate_proj", "re:.*up_proj")])
def test_a_run_goes_on_as_if_it_had_not_stopped(folder, tmp_path, calibrated, ignore):
    config = QuantConfig("int4-awq", group_size=32, ignore=ignore)
    kv = {"kv_dtype": "fp8"} if calibrated else {}
    with stream(str(folder)) as found:
        whole = job(found, tmp_path / "a", config, calibrated)
        wanted = work(whole, **kv)
        modules = {m: p for m, _, p in whole.layers()}
        dense = dict(whole.dense())
        if "re:.*gate_proj" in ignore:
            check_kept_mlp(dense, found)
    with stream(str(folder)) as found, pytest.raises(InterruptedError):
        work(job(found, tmp_path / "b", config, calibrated), layers=1, **kv)
    with stream(str(folder)) as found:
        again = job(found, tmp_path / "b", config, calibrated)
        assert again.partial.has("layer-00000") and not again.partial.has("layer-00001")
        assert work(again, **kv).report == wanted.report
        for module, _, packed in again.layers():
            assert packed.keys() == modules[module].keys()
            assert all(torch.equal(packed[name], modules[module][name]) for name in packed)
        assert {k: v.tolist() for k, v in again.dense()} == {
            k: v.tolist() for k, v in dense.items()
        }


def test_everything_of_the_checkpoint_comes_once(folder, tmp_path):
    config = QuantConfig("int4-awq", group_size=32, per_layer={"re:.*layers\\.1": "fp8"})
    with stream(str(folder)) as found:
        pieces = job(found, tmp_path, config)
        work(pieces)
        layers = list(pieces.layers())
        dense = list(pieces.dense())
        assert {f"{m}.weight" for m, _, _ in layers} | {k for k, _ in dense} == set(found.tensors)
        assert len(layers) + len(dense) == len(found.tensors)
        formats = {m: type(f).__name__ for m, f, _ in layers}
        assert formats["model.layers.0.self_attn.q_proj"] == "Int4"
        assert formats["model.layers.1.self_attn.q_proj"] == "Fp8"
        assert all(t.dtype == torch.bfloat16 for _, t in dense)
        same = {k for k, t in dense if torch.equal(t, found.tensor(k))}
        changed = {k for k, _ in dense} - same
    assert changed <= {f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")}
    assert changed


def test_layers_leave_memory_when_they_are_done(folder, tmp_path):
    with stream(str(folder)) as found:
        pieces = job(found, tmp_path, QuantConfig("int4", group_size=32), calibrated=False)
        seen = []

        def load(i):
            seen.append([n for n, p in found.decoder.named_parameters() if not p.is_meta])
            return pieces.load(i)

        run(found.decoder, pieces.plan, None, CPU, load=load, done=pieces.done, progress=False)
        assert seen == [[], []]
        pieces.load(0)
        assert not any(p.numel() for n, p in found.decoder.named_parameters() if "layers" in n)
