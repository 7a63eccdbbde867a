"""Run the steps that the scheduler plans: stage, launch, and read the drawn tokens later.

`launch` never waits for the GPU. A step's inputs go there in one copy; positions, slots and page
tables are made there; the decoder runs from a CUDA graph where a captured shape holds the step; the
drawn tokens stay there as inputs of the next step, and a copy of them starts on its way to the host.
`Flight.read` waits for that copy, by when the next step is already running.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlk.kernels._kv_codes import as_bytes
from tlk.kernels._paged_split import LEAST_KEYS
from tlk.kernels.paged_attention import preferred_page_size
from tlk.kernels.sampling import top_logprobs
from tlk.kernels.step import expand_step
from tlk.models.batch import Batch, KVCache, PagedKV, group_specs
from tlk.models.decoder import Decoder
from tlk.runtime.graphs import Graphs, Outputs, Shape, decode_shapes, mixed_shapes
from tlk.runtime.inputs import Expanded, Inputs, to_device
from tlk.runtime.options import EngineOptions
from tlk.runtime.request import Chunk, Request, Sequence, Step
from tlk.runtime.sampler import Sampler

PROMPT_ROWS = 256  # of whose logits the log-probabilities are taken at once


@dataclass(slots=True)
class Result:
    """What a step drew for one chunk: the token, and logprobs if the request wants them."""

    chunk: Chunk
    token: int
    logprobs: dict[int, float] | None


@dataclass(slots=True, eq=False)
class Flight:
    """A launched step, whose tokens are on their way to the host."""

    drawn: list[Chunk]
    tokens: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None
    prompts: list[tuple[Request, tuple[Tensor, Tensor, Tensor]]]
    done: Any = field(default=None)  # torch.cuda.Event on a GPU

    def read(self) -> list[Result]:
        """Wait for the step, and take what it drew; prompt logprobs go to their requests."""
        if self.done is not None:
            self.done.synchronize()
        for request, parts in self.prompts:
            assert request.prompt_logprobs is not None
            n = request.params.prompt_logprobs or 0
            request.prompt_logprobs += _tables(
                request.prompt, parts, n, len(request.prompt_logprobs)
            )
        tokens = self.tokens.tolist()
        logprobs: list[dict[int, float] | None] = [None] * len(tokens)
        if self.logprobs is not None:
            own, ids, values = (t.tolist() for t in self.logprobs)
            for i, chunk in enumerate(self.drawn):
                if (k := chunk.sequence.request.params.logprobs) is not None:
                    logprobs[i] = _table(tokens[i], own[i], ids[i][:k], values[i][:k])
        return [Result(*r) for r in zip(self.drawn, tokens, logprobs, strict=True)]


def _table(token: int, own: float, ids: list[int], values: list[float]) -> dict[int, float]:
    """Token to logprob, of the likeliest and of `token`; a token of probability zero has no id."""
    return {i: v for i, v in zip(ids, values, strict=True) if i >= 0} | {token: own}


def _tables(
    prompt: list[int], parts: tuple[Tensor, Tensor, Tensor], n: int, start: int
) -> list[dict[int, float] | None]:
    own, ids, values = (t.tolist() for t in parts)
    return [_table(prompt[start + i], own[i], ids[i][:n], values[i][:n]) for i in range(len(own))]


class Runner:
    """A decoder, its page pools and its state rows on one device.

    Pools and tables come with `allocate`; until then nothing can run.
    """

    def __init__(self, decoder: Decoder, options: EngineOptions) -> None:
        weight = decoder.embedding.weight
        self.decoder, self.options, self.device = decoder, options, weight.device
        self.page_size = options.page_size or preferred_page_size(self.device)
        dtype = options.kv_dtype(weight.dtype)
        self.specs = tuple(decoder.cache_specs(dtype, self.page_size))
        self.scales = decoder.cache_scales(dtype)
        self.groups: list[PagedKV] = group_specs(self.specs)[0]
        self.inputs = Inputs(options.max_num_seqs, options.max_num_batched_tokens, self.device)
        self.sampler = Sampler(decoder.config.vocab_size, options.max_num_seqs, self.device)
        self.graphs: Graphs | None = None
        self.eager_steps = 0
        self._owners: list[Sequence | None] = [None] * options.max_num_seqs
        self._decode: Any = decoder
        if options.compile:
            self._decode = torch.compile(decoder, fullgraph=True)

    def allocate(self, num_pages: Rows[int], max_model_len: int) -> None:
        """Pools of `num_pages` per group, and page tables for sequences of `max_model_len`."""
        options = self.options
        self.cache = KVCache.allocate(self.specs, num_pages, self.device, self.scales)
        self.max_pages = -(-max_model_len // self.page_size)
        with torch.inference_mode(False):
            self.tables = [
                torch.zeros(
                    options.max_num_seqs, self.max_pages, dtype=torch.int32, device=self.device
                )
                for _ in self.groups
            ]
            self._expanded = Expanded(
                self.groups, options.max_num_seqs, options.max_num_batched_tokens, self.max_pages,
                self.device,
            )  # fmt: skip
        self.graphs = None
        if self.device.type == "cuda" and not options.enforce_eager:
            budget = options.max_num_batched_tokens
            short = (2 * LEAST_KEYS - 1) // self.page_size  # of which attention makes no splits
            shapes = decode_shapes(min(options.max_num_seqs, budget), self.max_pages, short)
            shapes += mixed_shapes(options.max_num_seqs, budget, self.max_pages)
            self.graphs = Graphs(shapes)

    @property
    def salt(self) -> bytes:
        """What cached keys and values depend on besides their tokens: the dtype and its scales."""
        scales = [scale.numpy().tobytes() for pair in self.scales for scale in pair or ()]
        return b"".join([str(self.specs[0].dtype).encode(), *scales])

    # ---- one step

    @torch.inference_mode()
    def launch(self, step: Step) -> Flight:
        """Enqueue a step; nothing here waits for the device."""
        drawn = [chunk for chunk in step.chunks if chunk.samples]
        self._admit(step.chunks)
        self._set_pages(step)
        wanted = self._stage(step.chunks, drawn)
        hidden, logits = self._run(wanted, self._prompt_rows(step.chunks))
        prompts = self._prompt_logprobs(step.chunks, hidden)
        if not drawn:
            return self._fly(Flight(drawn, torch.empty(0, dtype=torch.int64), None, prompts))
        out = self.sampler.draw(logits[: len(drawn)], drawn, self.inputs)
        return self._fly(Flight(drawn, out.tokens, out.logprobs, prompts))

    def _admit(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            if self._owners[sequence.row] is not sequence:
                self._owners[sequence.row] = sequence
                self.sampler.admit(sequence)

    def _set_pages(self, step: Step) -> None:
        """Tell the device of new pages, and copy those that two sequences would write to."""
        entries: list[dict[int, int]] = [{} for _ in self.groups]  # the last one counts
        for group, row, index, page in step.new_pages:
            entries[group][row * self.max_pages + index] = page
        for table, new in zip(self.tables, entries, strict=True):
            if new:
                both = to_device(np.array([[*new], [*new.values()]]), self.device)
                table.view(-1).index_copy_(0, both[0], both[1].to(torch.int32))
        for group in {group for group, _, _ in step.copies}:
            pairs = [(a, b) for g, a, b in step.copies if g == group]
            source, target = to_device(np.array(pairs).T, self.device)
            for layer in self.cache.layers:
                if layer.group == group:
                    for pages in (as_bytes(layer.k), as_bytes(layer.v)):
                        pages.index_copy_(0, target, pages[source])

    def _stage(self, chunks: list[Chunk], drawn: list[Chunk]) -> Shape:
        """Write the step into the image of the inputs; the shape it has without padding."""
        n, host = len(chunks), self.inputs.host
        counts = np.fromiter((c.count for c in chunks), np.int32, n)
        ends = np.cumsum(counts, dtype=np.int32)
        total = int(ends[-1])
        host["rows"][:n] = np.fromiter((c.sequence.row for c in chunks), np.int32, n)
        host["seq_lens"][:n] = np.fromiter((c.start for c in chunks), np.int32, n) + counts
        host["cu_seqlens_q"][0] = 0
        host["cu_seqlens_q"][1 : n + 1] = ends
        host["rows"][n:], host["seq_lens"][n:], host["cu_seqlens_q"][n + 1 :] = -1, 0, total
        ids: list[int] = []
        for chunk in chunks:
            ids += _ids(chunk)
        host["ids"][:total] = ids
        last = ends - 1
        if len(drawn) != n:
            last = last[np.fromiter((c.samples for c in chunks), np.bool_, n)]
        host["logit_rows"][: len(drawn)] = last
        host["logit_rows"][len(drawn) :] = 0
        self.sampler.stage(drawn, self.inputs)
        pages = -(-int(host["seq_lens"][:n].max()) // self.page_size)
        return Shape(total, n, int(counts.max()), len(drawn), pages)

    def _run(self, step: Shape, needs_hidden: bool) -> Outputs:
        """The staged step from a graph if one holds it, else launch by launch."""
        shape = None
        if self.graphs is not None and not needs_hidden:
            shape = self.graphs.shape_for(step)
        if shape is not None and self.graphs is not None:
            self.inputs.host["ids"][step.tokens : shape.tokens] = 0
            self.inputs.send(shape.tokens)
            if self.graphs.capture(shape, self.forward):
                return self.graphs.replay(shape)
            return self._run(step, needs_hidden)  # memory ran out: the next larger one, or none
        self.inputs.send(step.tokens)
        self.eager_steps += 1
        return self.forward(step._replace(pages=self.max_pages))

    @torch.inference_mode()
    def forward(self, shape: Shape) -> Outputs:
        """The decoder on the first rows of the inputs: what a graph captures."""
        t, s = shape.tokens, shape.sequences
        i, e = self.inputs, self._expanded
        slots = tuple(x[:t] for x in e.slots)
        tables = tuple(x[:s] for x in e.tables)
        expand_step(
            i.ids[:t], i.cu_seqlens_q[: s + 1], i.seq_lens[:s], i.rows[:s], self.sampler.tokens,
            self.tables, self.page_size, e.ids[:t], e.positions[:t], slots, tables,
        )  # fmt: skip
        batch = Batch(
            positions=e.positions[:t],
            slots=slots,
            cu_seqlens_q=i.cu_seqlens_q[: s + 1],
            seq_lens=i.seq_lens[:s],
            page_tables=tuple(x[:, : shape.pages] for x in tables),
            max_q=shape.max_q,
        )
        hidden = self._decode(e.ids[:t], batch, self.cache)
        rows = hidden
        if shape.max_q > 1 or shape.logit_rows != t:
            rows = hidden[i.logit_rows[: shape.logit_rows]]
        return Outputs(hidden, self.decoder.logits(rows))

    def idle(self) -> None:
        """Stage a step of padding alone, in which graphs of any shape can be captured."""
        for name, values in self.inputs.host.items():
            values[:] = -1 if name == "rows" else 0
        self.inputs.send(len(self.inputs.ids))

    @torch.inference_mode()
    def rehearse(self, max_model_len: int) -> None:
        """Run the largest step there can be, on garbage, and draw from as many rows as may run."""
        options, host = self.options, self.inputs.host
        tokens, seqs = options.max_num_batched_tokens, options.max_num_seqs
        lengths = [min(max_model_len, tokens)] * max(tokens // max_model_len, 1)
        lengths = lengths[:seqs]
        n, total = len(lengths), sum(lengths)
        self.idle()
        host["rows"][:n] = 0
        host["seq_lens"][:n] = lengths
        host["cu_seqlens_q"][1 : n + 1] = np.cumsum(lengths)
        host["cu_seqlens_q"][n + 1 :] = total
        host["temperature"][:], host["top_p"][:] = 1.0, 0.9
        self.inputs.send(total)
        logits = self.forward(Shape(total, n, max(lengths), seqs, self.max_pages)).logits
        self.sampler.rehearse(logits, self.inputs)

    def free(self) -> None:
        """Give back graphs and pools; the runner cannot be used again."""
        if self.graphs is not None:
            self.graphs.clear()
        del self.cache, self.tables, self._expanded
        self._owners.clear()

    # ---- logprobs of prompts, and the way back

    def _prompt_rows(self, chunks: list[Chunk]) -> bool:
        return any(c.sequence.request.prompt_logprobs is not None for c in chunks)

    def _prompt_logprobs(
        self, chunks: list[Chunk], hidden: Tensor
    ) -> list[tuple[Request, tuple[Tensor, Tensor, Tensor]]]:
        """Logprobs of the prompt tokens that follow those of each chunk, where they are wanted."""
        found, row = [], 0
        for chunk in chunks:
            request, first = chunk.sequence.request, row
            row += chunk.count
            n = request.params.prompt_logprobs
            if n is None or chunk.sequence.index:
                continue
            start = max(chunk.start, request.prompt_scored)
            stop = min(chunk.start + chunk.count, len(request.prompt) - 1)
            for at in range(start, stop, PROMPT_ROWS):
                end = min(at + PROMPT_ROWS, stop)
                rows = hidden[first + at - chunk.start : first + end - chunk.start]
                targets = to_device(request.prompt[at + 1 : end + 1], self.device)
                found.append((request, top_logprobs(self.decoder.logits(rows), targets, n)))
            request.prompt_scored = max(request.prompt_scored, stop)
        return found

    def _fly(self, flight: Flight) -> Flight:
        """Start the copies to the host, and mark where they end."""
        if self.device.type == "cpu":
            return flight
        flight.tokens = _to_host(flight.tokens)
        if flight.logprobs is not None:
            flight.logprobs = _all_to_host(flight.logprobs)
        flight.prompts = [(request, _all_to_host(parts)) for request, parts in flight.prompts]
        flight.done = torch.cuda.Event()
        flight.done.record()
        return flight


def _ids(chunk: Chunk) -> list[int]:
    """The chunk's tokens; -1 - row for the one that the device has drawn and nobody has read."""
    sequence, end = chunk.sequence, chunk.start + chunk.count
    known = len(sequence.request.prompt) + len(sequence.output)
    if end <= known:
        return sequence.tokens(chunk.start, end)
    return [*sequence.tokens(chunk.start, known), -1 - sequence.row]


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _all_to_host(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = tensors
    return _to_host(a), _to_host(b), _to_host(c)
