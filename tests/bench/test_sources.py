import json

import pytest
import torch

from tests.models.zoo import tiny
from tlk.bench.shapes import SHAPES
from tlk.bench.sources import load_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    return folder


def test_a_checkpoint_alone_or_with_its_peer(folder):
    alone = load_source(str(folder), None, "auto", CPU, 0, peer=False)
    both = load_source(str(folder), None, "auto", CPU, 0, peer=True)
    assert alone.peer is None and alone.seconds > 0
    assert (
        both.decoder.embedding.weight.data_ptr() == both.peer.model.embed_tokens.weight.data_ptr()
    )
    for a, b in zip(alone.decoder.parameters(), both.decoder.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("peer", [False, True])
def test_random_weights_in_a_shape(folder, peer):
    for named in ("tiny", str(folder), str(folder / "config.json")):
        source = load_source(None, named, "auto", CPU, 3, peer=peer)
        again = load_source(None, named, "auto", CPU, 3, peer=peer)
        weight = source.decoder.embedding.weight
        assert weight.dtype == torch.float32 and (source.peer is not None) == peer
        assert torch.equal(weight, again.decoder.embedding.weight)
    config = json.loads((folder / "config.json").read_text())
    assert weight.shape == (config["vocab_size"], config["hidden_size"])
    assert load_source(None, "tiny", "bfloat16", CPU, 0, peer=peer).decoder.embedding.weight.dtype == torch.bfloat16  # fmt: skip


def test_an_unknown_shape():
    with pytest.raises(
        ValueError, match=r"random_weights must be a config.json.* tiny, got nothing"
    ):
        load_source(None, "nothing", "auto", CPU, 0, peer=False)


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_count_what_a_step_touches(tied, tmp_path):
    fields = SHAPES["tiny"] | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    sizes = load_source(None, str(tmp_path), "auto", CPU, 0, peer=False).sizes()
    attention = 256 * (256 + 128 + 128) + 256 * 256
    linear = 2 * (attention + 3 * 256 * 512)
    embedding, norms = 1024 * 256, 5 * 256
    assert sizes["linear_parameters"] == linear
    assert sizes["parameters"] == linear + norms + embedding * (1 if tied else 2)
    assert sizes["bytes"] == 4 * sizes["parameters"]
    assert sizes["decode_bytes"] == 4 * (linear + norms + embedding)
