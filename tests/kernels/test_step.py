import pytest
import torch

from tests.kernels.launches import record_launches
from tlk.kernels import step as module
from tlk.kernels.step import expand_step, expand_step_reference

ROWS = 7


class Step:
    """A step of `queries` of sequences of `lengths` tokens, and what must come of it."""

    def __init__(self, queries, lengths, device, page=4, padding=0, groups=1, pages=40, spare=4):
        self.page = page
        n, seqs = sum(queries), len(queries)
        self.lengths = lengths
        self.rows = [(3 * s + 2) % ROWS if length else -1 for s, length in enumerate(lengths)]
        generator = torch.Generator().manual_seed(1)
        self.tables = [
            torch.randint(0, 2**31 // page, (ROWS, pages), generator=generator, dtype=torch.int32)
            for _ in range(groups)
        ]
        tokens = torch.randint(0, 1000, (ROWS,), generator=generator)
        ids, self.ids, self.positions, self.slots = [], [], [], [[] for _ in range(groups)]
        cu = [0]
        for s, (count, length) in enumerate(zip(queries, lengths, strict=True)):
            cu.append(cu[-1] + count)
            for i, position in enumerate(range(length - count, length)):
                drawn = i == count - 1
                ids.append(-1 - self.rows[s] if drawn else 5000 + i)
                self.ids.append(int(tokens[self.rows[s]]) if drawn else 5000 + i)
                self.positions.append(position)
                for table, slots in zip(self.tables, self.slots, strict=True):
                    slots.append(
                        int(table[self.rows[s], position // page]) * page + position % page
                    )
        self.ids += [0] * padding
        self.positions += [0] * padding
        for slots in self.slots:
            slots += [-1] * padding

        def tensor(values, dtype):
            return torch.tensor(values, dtype=dtype, device=device)

        self.inputs = (
            tensor(ids + [0] * padding, torch.int64), tensor(cu, torch.int32),
            tensor(lengths, torch.int32), tensor(self.rows, torch.int32), tokens.to(device),
            [t.to(device) for t in self.tables], page,
        )  # fmt: skip
        total = n + padding
        self.out = (
            *(torch.full((total,), -7, device=device) for _ in range(2)),
            [torch.full((total,), -7, device=device) for _ in range(groups)],
            [tensor([[-7] * (pages + spare)] * seqs, torch.int32) for _ in range(groups)],
        )

    def verify(self):
        ids, positions, slots, tables = self.out
        assert ids.tolist() == self.ids
        assert positions.tolist() == self.positions
        assert [s.tolist() for s in slots] == self.slots
        for out, table in zip(tables, self.tables, strict=True):
            for s, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
                used = -(-length // self.page)
                assert out[s, :used].tolist() == table[row, :used].tolist()


STEPS = {
    "decode": ([1, 1, 1], [9, 1, 33]),
    "one": ([1], [17]),
    "prefill": ([130], [150]),
    "mixed": ([70, 1, 3, 1, 64], [70, 12, 9, 130, 65]),
    "without tokens": ([0, 2, 0, 0, 1, 0], [0, 2, 8, 0, 7, 0]),
    "many": ([1] * 150, [1 + i for i in range(150)]),
}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", STEPS)
def test_reference(name, padding):
    step = Step(*STEPS[name], "cpu", padding=padding)
    *inputs, tables, page = step.inputs
    ids, positions, slots, out = step.out
    expand_step_reference(*inputs, tables[0], page, ids, positions, slots[0], out[0])
    step.verify()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", STEPS)
def test_expand_step(name, padding, groups, device):
    step = Step(*STEPS[name], device, padding=padding, groups=groups)
    expand_step(*step.inputs, *step.out)
    step.verify()
    used = max(-(-n // step.page) for n in step.lengths)
    for out in step.out[3]:  # no more is copied than a vector
        assert (out[:, used + 3 :] == -7).all()


@pytest.mark.parametrize("pages, spare", [(12, 0), (9, 0), (9, 3), (12, 1)])
def test_full_tables_of_any_width(pages, spare, device):
    """Nothing behind a table is read; the interpreter checks every address."""
    step = Step([1, 2], [4 * pages, 4 * pages], device, pages=pages, spare=spare)
    expand_step(*step.inputs, *step.out)
    step.verify()


def test_nothing_but_padding(device):
    step = Step([0], [0], device, padding=5)
    expand_step(*step.inputs, *step.out)
    step.verify()


@pytest.mark.parametrize("page", [1, 16, 12])
def test_page_sizes(page, device):
    step = Step([5, 1], [39, 16], device, page=page)
    expand_step(*step.inputs, *step.out)
    step.verify()


def test_pages_left_of_a_window_are_copied_as_they_are(device):
    step = Step([1, 2], [30, 9], device)
    for table in (step.tables[0], step.inputs[5][0]):
        table[step.rows[0], :5] = -1
    expand_step(*step.inputs, *step.out)
    step.verify()
    step.inputs[5][0][step.rows[1], 2] = -1  # of the last token of the second sequence
    expand_step(*step.inputs, *step.out)
    assert step.out[2][0].tolist() == [*step.slots[0][:2], -1]


def test_long_tables(device):
    """More pages than a program copies at once, of rows wider than that."""
    step = Step([1], [3], device)
    table = torch.arange(2 * 2600, dtype=torch.int32, device=device).view(2, 2600)
    out = torch.full((1, 2600), -7, dtype=torch.int32, device=device)
    inputs = list(step.inputs)
    inputs[2], inputs[3], inputs[5] = (x.to(device) for x in (
        torch.tensor([4 * 2050], dtype=torch.int32), torch.tensor([1], dtype=torch.int32), table,
    ))  # fmt: skip
    inputs[0] = torch.tensor([3], device=device)
    ids, positions, slots, _ = step.out
    expand_step(*inputs[:5], [table], 4, ids, positions, slots, [out])
    assert torch.equal(out[0, :2050], table[1, :2050]) and (out[0, 2052:] == -7).all()
    assert positions.tolist() == [8199] and slots[0].tolist() == [(2600 + 2049) * 4 + 3]


def test_one_launch_a_group(device, monkeypatch):
    grids = record_launches(monkeypatch, module, "_expand_step_kernel")
    step = Step([70, 1], [70, 12], device, groups=2)
    expand_step(*step.inputs, *step.out)
    assert grids == [(2 + 2,)] * 2


def test_registration(device):
    step = Step([3, 1], [9, 12], device)
    *inputs, tables, page = step.inputs
    ids, positions, slots, out = step.out
    args = (*inputs, tables[0], page, ids, positions, slots[0], out[0])
    torch.library.opcheck(torch.ops.tlk.expand_step.default, args)
    compiled = torch.compile(expand_step, fullgraph=True, backend="aot_eager")
    compiled(*step.inputs, *step.out)
    step.verify()


def test_bad_input_is_refused(device):
    step = Step([3, 1], [9, 12], device)

    def refuses(error, message, **change):
        names = (
            "ids", "cu_seqlens_q", "seq_lens", "rows", "tokens", "tables", "page_size", "ids_out",
            "positions", "slots", "tables_out",
        )  # fmt: skip
        args = dict(zip(names, (*step.inputs, *step.out), strict=True)) | change
        with pytest.raises(error, match=message):
            expand_step(*args.values())

    ids, cu, lens, rows, tokens, tables, _ = step.inputs
    ids_out, positions, slots, out = step.out
    refuses(TypeError, "ids must be int64, got int32", ids=ids.int())
    refuses(ValueError, r"ids must have shape \(any\)", ids=ids[None])
    refuses(ValueError, r"cu_seqlens_q must have shape \(3\), got \(2,\)", cu_seqlens_q=cu[1:])
    refuses(TypeError, "seq_lens must be int32", seq_lens=lens.long())
    refuses(ValueError, "at least one sequence", seq_lens=lens[:0])
    refuses(ValueError, r"rows must have shape \(2\)", rows=rows[1:])
    refuses(TypeError, "tokens must be int64", tokens=tokens.int())
    refuses(ValueError, "tokens must be on", tokens=tokens.to("meta"))
    refuses(TypeError, "tables must be int32", tables=[tables[0].long()])
    refuses(ValueError, "tables must have stride 1", tables=[tables[0].T.contiguous().T])
    refuses(ValueError, "page_size must be at least 1, got 0", page_size=0)
    refuses(ValueError, r"ids_out must have shape \(4\)", ids_out=ids_out[1:])
    refuses(ValueError, "positions must have stride 1", positions=positions[:1].expand(4))
    refuses(TypeError, "slots must be int64", slots=[slots[0].int()])
    refuses(ValueError, "slots must have one tensor for each table, got 0", slots=[])
    refuses(ValueError, "slots must have one tensor for each table", tables=[], slots=[])
    refuses(ValueError, r"tables_out must have shape \(2, any\)", tables_out=[out[0][1:]])
    refuses(ValueError, "tables_out must have 40 columns, got 39", tables_out=[out[0][:, :39]])
