import pytest
import torch

from tests.quant.golden.load import cases
from tlk.errors import CheckpointError
from tlk.quant.files import gptq
from tlk.quant.files._bits import pack_words, unpack_words
from tlk.quant.files.gptq import GPTQ, order_of_groups, zeros
from tlk.quant.int4 import Int4
from tlk.quant.int8 import Int8Weight


def words(*hexadecimal):
    return torch.tensor([hexadecimal], dtype=torch.int64).to(torch.int32)


def signed(word):
    return word - 2**32 if word >= 2**31 else word


@pytest.mark.parametrize(
    "bits, codes, packed",
    [
        (4, range(8), [0x76543210]),
        (8, range(4), [0x03020100]),
        (3, [k % 8 for k in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (3, [4] * 32, [0x24924924, 0x49249249, 0x92492492]),
        (2, [3, 2, 1, 0] * 4, [0x1B1B1B1B]),
    ],
)
def test_words_hold_the_first_code_lowest(bits, codes, packed):
    expected = words(*map(signed, packed))
    assert torch.equal(pack_words(torch.tensor([list(codes)]), bits), expected)
    assert unpack_words(expected, bits, len(codes)).tolist() == [list(codes)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_of_every_width_come_back(bits):
    codes = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(0))
    packed = pack_words(codes, bits)
    assert packed.shape == (3, -(-64 * bits // 32))
    assert torch.equal(unpack_words(packed, bits, 64), codes.to(torch.uint8))


def test_negative_words_are_not_sign_extended():
    assert unpack_words(words(-1), 4, 8).tolist() == [[15] * 8]
    assert unpack_words(words(-1, -1, -1), 3, 32).tolist() == [[7] * 32]
    across = unpack_words(words(-(2**31), 0, 0), 3, 32)[
        0
    ].tolist()  # its top bit, and none of the next
    assert across == [0] * 10 + [2] + [0] * 21


def test_zeros_of_version_1_are_undone_by_word():
    # z = [0, 15, 8, 8, …]: version 2 is 0x888888F0, and one less in each field borrows from the next
    stored = words(0x777777DF)
    assert zeros(stored, 4, 8, 1).tolist() == [[0, 15, 8, 8, 8, 8, 8, 8]]
    assert zeros(words(0x77777777), 4, 8, 1).tolist() == [[8] * 8]
    assert zeros(words(signed(0x88888888)), 4, 8, 2).tolist() == [[8] * 8]
    assert zeros(words(signed(0x88888887)), 4, 8, 1)[0, 0] == 8
    assert zeros(words(-1), 4, 8, 1).tolist() == [[0] + [1] * 7]  # the sum leaves 32 bits


def test_inputs_sorted_by_group():
    g_idx = torch.tensor([1, 0, 1, 0, 2, 2])
    assert order_of_groups("a", g_idx, 3).tolist() == [[1, 3, 0, 2, 4, 5]]
    assert order_of_groups("a", torch.tensor([0, 0, 1, 1]), 2) is None
    for bad in ([0, 0, 0, 1], [0, 1, 2, 3], [-1, 0, 1, 1]):
        with pytest.raises(CheckpointError, match=r"a\.g_idx does not give each of 2 groups"):
            order_of_groups("a", torch.tensor(bad), 2)


def test_a_file_without_g_idx_has_groups_in_order():
    case = cases("gptqmodel")["sym_v1_4bit"]
    tensors = {k: t for k, t in case.tensors.items() if k != "g_idx"}
    scheme = gptq.scheme(case.config)
    with_it, without = (scheme.read("a", t, case.shape).packed for t in (case.tensors, tensors))
    assert with_it.keys() == without.keys() and "perm" not in with_it
    assert all(torch.equal(with_it[k], without[k]) for k in with_it)


def test_symmetric_files_ignore_their_zeros():
    case = cases("gptqmodel")["sym_v1_4bit"]
    wrong = case.tensors | {"qzeros": torch.zeros_like(case.tensors["qzeros"])}
    packed = gptq.scheme(case.config).read("a", wrong, case.shape).packed
    assert "zero" not in packed


def test_old_layouts_of_groups_and_widths():
    for bits, kind in ((2, Int4), (3, Int4), (8, Int8Weight)):
        case = cases("gptqmodel")[f"sym_v1_{bits}bit"]
        assert isinstance(gptq.scheme(case.config).read("a", case.tensors, case.shape).format, kind)
    with pytest.raises(CheckpointError, match=r"a\.scales must have 2 groups of 64 inputs, got 4"):
        GPTQ(group_size=64).read("a", cases("gptqmodel")["sym_v1_4bit"].tensors, (32, 128))


def test_overrides_by_module():
    scheme = gptq.scheme(
        {
            "bits": 4, "group_size": 128, "sym": True, "lm_head": True,
            "dynamic": {
                r"-:.*layers\.0\.": {}, r"+:.*down_proj": {"bits": 8, "group_size": 32}, ".*up": {"sym": False},
            },
        }
    )  # fmt: skip
    assert scheme.listed("model.layers.0.mlp.down_proj") is False
    assert scheme.listed("model.layers.1.mlp.down_proj") is None  # its tensors decide
    assert scheme.listed("lm_head") is None and gptq.scheme({"bits": 4}).listed("lm_head") is False
    assert scheme.of("model.layers.1.mlp.down_proj").bits == 8
    assert scheme.of("model.layers.1.mlp.down_proj").group_size == 32
    assert scheme.of("model.layers.1.mlp.up_proj").symmetric is False
    assert scheme.of("model.layers.1.self_attn.q_proj") is scheme


def test_modules_of_a_block_by_the_ends_of_their_names():
    lists = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    own = gptq.scheme({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": lists})
    assert own.listed("model.layers.3.mlp.down_proj") and own.listed("a.self_attn.k_proj")
    assert own.listed("model.layers.3.mlp.up_proj") is False and own.listed("lm_head") is False
    assert own.listed("a.other_self_attn.k_proj") is False


def test_group_size_minus_one_is_one_group():
    assert gptq.scheme({"bits": 4, "group_size": -1}).group_size is None
