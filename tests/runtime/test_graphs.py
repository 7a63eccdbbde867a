import pytest
import torch

from tests.runtime.demo import DEVICE
from tlk.runtime.graphs import Graphs, Outputs, Shape, decode_shapes, decode_sizes, mixed_shapes


def never(shape):
    raise AssertionError("nothing is captured here")


PAGES, SHORT = 30, 7


def decode(sequences, pages=PAGES):
    return Shape(sequences, sequences, 1, sequences, pages)


def mixed(tokens, sequences):
    return Shape(tokens, sequences, tokens, sequences, PAGES)


def graphs(max_num_seqs=40, budget=64):
    shapes = decode_shapes(max_num_seqs, PAGES, SHORT)
    return Graphs(shapes + mixed_shapes(max_num_seqs, budget, PAGES))


def test_batch_sizes():
    assert decode_sizes(1) == [1]
    assert decode_sizes(3) == [1, 2, 3]
    assert decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_sizes(64) == [1, 2, 4, *range(8, 65, 8)]
    assert decode_sizes(300)[-3:] == [256, 288, 300]
    for most in range(1, 600, 7):
        sizes = decode_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most


def test_few_sequences_have_a_shape_for_short_ones():
    shapes = decode_shapes(24, PAGES, SHORT)
    assert [s.sequences for s in shapes if s.pages == SHORT] == [1, 2, 4, 8, 16]
    assert [s.sequences for s in shapes if s.pages == PAGES] == [1, 2, 4, 8, 16, 24]
    for short in (0, 30, 31):
        assert {s.pages for s in decode_shapes(24, PAGES, short)} == {PAGES}


def test_mixed_shapes_fit_the_budget():
    assert mixed_shapes(40, 64, PAGES) == [mixed(16, 16), mixed(32, 32), mixed(64, 40)]
    assert mixed_shapes(40, 15, PAGES) == []


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (Shape(1, 1, 1, 1, 7), decode(1, SHORT)),
        (Shape(1, 1, 1, 1, 8), decode(1)),
        (Shape(3, 3, 1, 3, 1), decode(4, SHORT)),
        (Shape(3, 3, 1, 3, 30), decode(4)),
        (Shape(17, 17, 1, 17, 1), decode(24)),
        (Shape(40, 40, 1, 40, 2), decode(40)),
        (Shape(3, 1, 3, 1, 1), mixed(16, 16)),
        (Shape(16, 16, 1, 15, 1), mixed(16, 16)),  # one of them is a prompt that goes on
        (Shape(20, 17, 4, 17, 30), mixed(32, 32)),
        (Shape(64, 40, 20, 40, 1), mixed(64, 40)),
        (Shape(65, 1, 65, 1, 2), None),
        (Shape(1, 1, 1, 1, 31), None),
    ],
)
def test_the_smallest_shape_that_holds_a_step(step, shape):
    assert graphs().shape_for(step) == shape


def test_the_largest_comes_first():
    tokens = [shape.tokens for shape in graphs().shapes]
    assert tokens == sorted(tokens, reverse=True)


def test_a_shape_for_which_there_is_no_memory_is_given_up(monkeypatch):
    def full(self, shape, forward):
        raise torch.OutOfMemoryError("no memory")

    g = graphs()
    monkeypatch.setattr(Graphs, "_capture", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert not g.capture(decode(4), never)
    assert g.dropped == [decode(4)]
    assert g.shape_for(decode(3)) == decode(8)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_reads_what_lies_in_its_inputs_now():
    x = torch.zeros(8, device="cuda")

    def forward(shape):
        return Outputs(x[: shape.tokens] + 1, x[: shape.logit_rows] * 2)

    g = Graphs([decode(2), decode(8)])
    for shape in g.shapes:
        assert g.capture(shape, forward)
    for value in (3.0, 5.0):
        x.fill_(value)
        hidden, logits = g.replay(decode(2))
        assert hidden.tolist() == [value + 1] * 2 and logits.tolist() == [2 * value] * 2
    assert g.replays == 2
