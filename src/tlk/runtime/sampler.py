"""Draw the next tokens of a mixed batch, each by its own request's settings.

What a request sets is kept per state row on the host and sent with each step; what depends on its
tokens (their counts, an allowed set) lies on the device per state row, made when the first request
needs it. The order is vLLM's: allowed tokens, biases and bans, penalties, then temperature, top-k,
top-p, min-p and the draw in one kernel, whose noise depends on the request's seed and the token's
position only. If all rows take the likeliest token, one op finds and keeps it.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlk.kernels.likeliest import likeliest_
from tlk.kernels.sampling import apply_penalties_, sample, top_logprobs
from tlk.runtime.inputs import Inputs, to_device, upload
from tlk.runtime.request import Chunk, Sequence

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(slots=True)
class Drawn:
    """On the device: tokens [R], and the logprobs of rows where some request wants them.

    logprobs: of the token [R], and the ids and logprobs [R, n] of the likeliest.
    """

    tokens: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None


class Sampler:
    """The sampling state of `max_seqs` state rows."""

    def __init__(self, vocab_size: int, max_seqs: int, device: torch.device) -> None:
        self.vocab_size, self.max_seqs, self.device = vocab_size, max_seqs, device
        self.tokens = torch.zeros(max_seqs, dtype=torch.int64, device=device)
        self._host: dict[str, np.ndarray] = {
            "temperature": np.zeros(max_seqs, np.float32),
            "top_p": np.ones(max_seqs, np.float32),
            "min_p": np.zeros(max_seqs, np.float32),
            "top_k": np.zeros(max_seqs, np.int32),
            "seeds": np.zeros(max_seqs, np.int64),
        }
        self._penalties = np.zeros((3, max_seqs), np.float32)
        self._prompt_mask: Tensor | None = None  # [max_seqs, vocab] bool
        self._output_counts: Tensor | None = None  # [max_seqs, vocab] int32
        self._allowed: Tensor | None = None  # [max_seqs, vocab] bool

    def admit(self, sequence: Sequence) -> None:
        """Take over the settings and the tokens so far of a sequence that got its state row."""
        row, params = sequence.row, sequence.request.params
        for name in ("temperature", "top_p", "min_p", "top_k"):
            self._host[name][row] = getattr(params, name)
        self._host["seeds"][row] = sequence.seed
        self._penalties[:, row] = [getattr(params, name) for name in PENALTIES]
        if params.penalizes:
            self._admit_penalties(sequence)
        if params.allowed_token_ids is not None:
            if self._allowed is None:
                self._allowed = self._per_row(torch.bool)
            self._allowed[row].zero_()
            self._allowed[row].index_fill_(
                0, to_device(list(params.allowed_token_ids), self.device), True
            )

    def _admit_penalties(self, sequence: Sequence) -> None:
        if self._prompt_mask is None or self._output_counts is None:
            self._prompt_mask = self._per_row(torch.bool)
            self._output_counts = self._per_row(torch.int32)
        mask, counts = self._prompt_mask[sequence.row], self._output_counts[sequence.row]
        mask.zero_().index_fill_(0, to_device(sequence.request.prompt, self.device), True)
        counts.zero_()
        if sequence.output:
            output = to_device(sequence.output, self.device)
            counts.scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _per_row(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.max_seqs, self.vocab_size, dtype=dtype, device=self.device)

    def stage(self, drawn: Rows[Chunk], inputs: Inputs) -> None:
        """Write what the drawing kernel needs of each row into the image of `inputs`."""
        n, host = len(drawn), inputs.host
        rows = np.fromiter((c.sequence.row for c in drawn), np.int64, n)
        host["drawn_rows"][:n] = rows
        host["offsets"][:n] = np.fromiter((c.start + c.count for c in drawn), np.int64, n)
        for name, values in self._host.items():
            host[name][:n] = values[rows]

    def draw(self, logits: Tensor, drawn: Rows[Chunk], inputs: Inputs) -> Drawn:
        """The tokens of rows `logits` [R, vocab], also kept in `tokens` for the next step."""
        n, raw = len(drawn), logits
        params = [c.sequence.request.params for c in drawn]
        rows = inputs.drawn_rows[:n]
        penalize = any(p.penalizes for p in params)
        bans = _edits(drawn)
        allowed = [i for i, p in enumerate(params) if p.allowed_token_ids is not None]
        if penalize or bans or allowed:
            logits = logits.to(torch.float32, copy=True)
        if allowed:
            self._keep_allowed(logits, drawn, allowed)
        if bans:
            self._add(logits, bans)
        if penalize:
            self._penalize(logits, rows, drawn)
        if all(p.greedy for p in params):
            tokens = likeliest_(logits, self.tokens, rows)
        else:
            tokens, _ = sample(
                logits, inputs.temperature[:n], inputs.top_k[:n], inputs.top_p[:n],
                inputs.min_p[:n], inputs.seeds[:n], inputs.offsets[:n],
            )  # fmt: skip
            self.tokens.index_copy_(0, rows, tokens)
        if penalize and self._output_counts is not None:
            at = rows * self.vocab_size + tokens
            one = torch.ones_like(at, dtype=torch.int32)
            self._output_counts.view(-1).scatter_add_(0, at, one)
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        logprobs = top_logprobs(raw, tokens, max(wanted)) if wanted else None
        return Drawn(tokens, logprobs)

    def rehearse(self, logits: Tensor, inputs: Inputs) -> None:
        """Compile what draws from rows `logits` [R, vocab], and take the memory that it takes."""
        n = len(logits)
        for rows in (logits, logits.to(torch.float32, copy=True)):
            sample(
                rows, inputs.temperature[:n], inputs.top_k[:n], inputs.top_p[:n],
                inputs.min_p[:n], inputs.seeds[:n], inputs.offsets[:n],
            )  # fmt: skip
            likeliest_(rows, self.tokens, inputs.drawn_rows[:n])

    def _keep_allowed(self, logits: Tensor, drawn: Rows[Chunk], which: list[int]) -> None:
        assert self._allowed is not None
        at = to_device(which, self.device)
        state = to_device([drawn[i].sequence.row for i in which], self.device)
        kept = logits[at].masked_fill_(~self._allowed[state], -torch.inf)
        logits.index_copy_(0, at, kept)

    def _add(self, logits: Tensor, edits: list[tuple[int, int, float]]) -> None:
        """logits[row, token] += value for each (row, token, value)."""
        at = to_device([row * self.vocab_size + token for row, token, _ in edits], self.device)
        values = upload(np.array([v for _, _, v in edits], np.float32), self.device)
        logits.view(-1).scatter_add_(0, at, values.to(self.device, non_blocking=True))

    def _penalize(self, logits: Tensor, rows: Tensor, drawn: Rows[Chunk]) -> None:
        assert self._prompt_mask is not None and self._output_counts is not None
        chosen = self._penalties[:, [c.sequence.row for c in drawn]]
        vectors = upload(np.ascontiguousarray(chosen), self.device)
        repetition, presence, frequency = vectors.to(self.device, non_blocking=True)
        apply_penalties_(
            logits, self._prompt_mask, self._output_counts, repetition, presence, frequency,
            rows=rows,
        )  # fmt: skip


def _edits(drawn: Rows[Chunk]) -> list[tuple[int, int, float]]:
    """(row, token, value) to be added to the logits: biases, and -inf for what must not come."""
    edits: list[tuple[int, int, float]] = []
    for i, chunk in enumerate(drawn):
        request = chunk.sequence.request
        if request.plain:
            continue
        params = request.params
        if params.logit_bias:
            edits += [(i, token, value) for token, value in params.logit_bias.items()]
        if chunk.sequence.drawn <= params.min_tokens:  # the token to come is counted already
            edits += [(i, token, -torch.inf) for token in request.ends]
        edits += [(i, token, -torch.inf) for token in _completing(chunk.sequence)]
    return edits


def _completing(sequence: Sequence) -> set[int]:
    """The tokens that would complete one of the request's bad words."""
    known = len(sequence.request.prompt) + len(sequence.output)
    tokens = set()
    for word in sequence.request.bad_words:
        before = len(word) - 1
        if before <= known and sequence.tokens(known - before, known) == list(word[:-1]):
            tokens.add(word[-1])
    return tokens
