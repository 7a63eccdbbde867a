import pytest
import torch

from tlk.errors import CheckpointError
from tlk.hf.partial import Partial

ABOUT = {"method": "int4", "ids": 7}


def test_pieces_are_found_again(tmp_path):
    folder = tmp_path / "out.partial"
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5, dtype=torch.uint8)}
    tensors["c"] = torch.randn(4).to(torch.float8_e4m3fn)
    Partial(folder, ABOUT).save("layer-0", tensors, {"x": [1, 2]})
    found, about = Partial(folder, ABOUT).load("layer-0")
    assert about == {"x": [1, 2]} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    assert Partial(folder, ABOUT).load("layer-1") is None


def test_another_run_is_refused_or_thrown_away(tmp_path):
    Partial(tmp_path, ABOUT).save("p", {}, {})
    with pytest.raises(CheckpointError, match=r"unfinished run that differs in ids, more: delete"):
        Partial(tmp_path, {"method": "int4", "ids": 8, "more": 1})
    assert Partial(tmp_path, ABOUT | {"ids": 8}, anew=True).load("p") is None
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="differs in everything"):
        Partial(tmp_path, ABOUT)


def test_a_piece_is_whole_or_not_there(tmp_path):
    run = Partial(tmp_path, ABOUT)
    run.save("p", {"a": torch.ones(2)}, {})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p.safetensors", "run.json"]
    (tmp_path / "p.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"p\.safetensors is corrupt, delete it"):
        run.load("p")
    run.remove()
    assert not tmp_path.exists()
