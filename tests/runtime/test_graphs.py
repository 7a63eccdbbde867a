import pytest
import torch

from tests.runtime.demo import DEVICE
from tlk.runtime.graphs import Graphs, Outputs, Shape, decode_shape, decode_sizes, mixed_shapes


def never(shape):
    raise AssertionError("nothing is captured here")


def graphs(max_num_seqs=40, budget=64):
    shapes = [decode_shape(n) for n in decode_sizes(max_num_seqs)]
    return Graphs(never, shapes + mixed_shapes(max_num_seqs, budget))


def test_batch_sizes():
    assert decode_sizes(1) == [1]
    assert decode_sizes(3) == [1, 2, 3]
    assert decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_sizes(64) == [1, 2, 4, *range(8, 65, 8)]
    assert decode_sizes(300)[-3:] == [256, 288, 300]
    for most in range(1, 600, 7):
        sizes = decode_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most


def test_mixed_shapes_fit_the_budget():
    assert mixed_shapes(40, 64) == [
        Shape(16, 16, 16, 16), Shape(32, 32, 32, 32), Shape(64, 40, 64, 40)
    ]  # fmt: skip
    assert mixed_shapes(40, 15) == []


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (Shape(1, 1, 1, 1), decode_shape(1)),
        (Shape(3, 3, 1, 3), decode_shape(4)),
        (Shape(40, 40, 1, 40), decode_shape(40)),
        (Shape(3, 1, 3, 1), Shape(16, 16, 16, 16)),
        (Shape(16, 16, 1, 15), Shape(16, 16, 16, 16)),  # one of them is a prompt that goes on
        (Shape(20, 17, 4, 17), Shape(32, 32, 32, 32)),
        (Shape(64, 40, 20, 40), Shape(64, 40, 64, 40)),
        (Shape(65, 1, 65, 1), None),
    ],
)
def test_the_smallest_shape_that_holds_a_step(step, shape):
    assert graphs().shape_for(step) == shape


def test_the_largest_comes_first():
    tokens = [shape.tokens for shape in graphs().shapes]
    assert tokens == sorted(tokens, reverse=True)


def test_a_shape_for_which_there_is_no_memory_is_given_up(monkeypatch):
    def full(self, shape):
        raise torch.OutOfMemoryError("no memory")

    g = graphs()
    monkeypatch.setattr(Graphs, "_capture", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert not g.capture(decode_shape(4))
    assert g.dropped == [decode_shape(4)]
    assert g.shape_for(decode_shape(3)) == decode_shape(8)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_reads_what_lies_in_its_inputs_now():
    x = torch.zeros(8, device="cuda")

    def forward(shape):
        return Outputs(x[: shape.tokens] + 1, x[: shape.logit_rows] * 2)

    g = Graphs(forward, [decode_shape(2), decode_shape(8)])
    for shape in g.shapes:
        assert g.capture(shape)
    for value in (3.0, 5.0):
        x.fill_(value)
        hidden, logits = g.replay(decode_shape(2))
        assert hidden.tolist() == [value + 1] * 2 and logits.tolist() == [2 * value] * 2
    assert g.replays == 2
