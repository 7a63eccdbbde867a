"""A transformers forward call, turned into the flat tokens of tlk's decoder and back.

transformers hands over padded [B, q] inputs with a mask; the decoder wants one row per real token.
What the decoder cannot express is refused with a reason, and the caller runs the original forward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlk.hf.cache import PagedCache
from tlk.models.batch import Batch


class Inexpressible(Exception):
    """tlk's decoder cannot run this call; the message says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """What `Decoder.forward` and `Decoder.logits` get, and how the logits are laid out again."""

    ids: Tensor | None  # [T]
    embeds: Tensor | None  # [T, hidden]
    batch: Batch
    length: int  # all positions are below it
    new: Tensor | None  # [B, q] False where padding, None without padding
    shape: tuple[int, int]  # of the logits: sequences, positions
    padding: Tensor | None  # [B, positions] True where a logit row stands for padding

    def layout(self, logits: Tensor) -> Tensor:
        """Logits [rows, vocab] as [B, positions, vocab], 0 where padding."""
        logits = logits.view(*self.shape, logits.shape[-1])
        return logits if self.padding is None else logits.masked_fill(self.padding[..., None], 0)


def flatten(
    ids: Tensor | None,
    embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    logits_to_keep: Any,
    cache: PagedCache,
    *,
    windowed: bool,
) -> Call:
    """Turn the inputs of a forward call into a `Call`, with room made in `cache`.

    ids [B, q] or embeds [B, q, hidden]; attention_mask [B, past + q]; position_ids [B or 1, q].
    Raises Inexpressible, before anything has changed, for what only the original forward can do.
    """
    inputs = ids if ids is not None else embeds
    assert inputs is not None
    sequences, count = inputs.shape[:2]
    kept = _kept(logits_to_keep, count, inputs.device)
    if position_ids is not None:
        position_ids = _positions(position_ids, sequences, count)
    if cache.trusted and cache.length and count == 1:
        new = None
        highest = cache.max_position + 1
    else:
        new, highest = _examine(attention_mask, position_ids, cache, sequences, count, windowed)
    cache.begin(sequences, count)
    if position_ids is None:
        first = cache.length
        position_ids = torch.arange(first, first + count, device=inputs.device)
        position_ids = position_ids.expand(sequences, count)
    cache.max_position = max(cache.max_position, highest)

    slots = cache.slots_of(new, count)
    row = None  # [B, q]: the flat row of each token
    if new is None:
        flat: Tensor | slice = slice(None)
        q_lens = torch.full((sequences,), count, dtype=torch.int32, device=inputs.device)
    else:
        flat = new.flatten().nonzero().squeeze(1)
        q_lens = new.sum(1, dtype=torch.int32)
        row = (new.flatten().cumsum(0) - 1).clamp(min=0).view(sequences, count)
    if kept is None and row is None:
        logit_rows, padding = None, None
    else:
        columns = torch.arange(count, device=inputs.device) if kept is None else kept
        if row is None:
            row = torch.arange(sequences * count, device=inputs.device).view(sequences, count)
        logit_rows = row[:, columns].flatten()
        padding = None if new is None else ~new[:, columns]
    tables = (cache.page_table,) * cache.groups
    batch = Batch(
        positions=position_ids.flatten()[flat],
        slots=(slots.flatten()[flat],) * cache.groups,
        cu_seqlens_q=torch.nn.functional.pad(q_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        seq_lens=cache.seq_lens + q_lens,
        page_tables=tables,
        logit_rows=logit_rows,
        max_q=count,
    )
    return Call(
        ids=None if ids is None else ids.flatten()[flat],
        embeds=None if embeds is None else embeds.flatten(0, 1)[flat],
        batch=batch,
        length=cache.max_position + 1,
        new=new,
        shape=(sequences, count if kept is None else len(kept)),
        padding=padding,
    )


def _kept(logits_to_keep: Any, count: int, device: torch.device) -> Tensor | None:
    """The columns [k] whose logits are wanted, or None for all."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep == 0 or logits_to_keep >= count:
            return None
        return torch.arange(count, device=device)[-logits_to_keep:]
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1:
        return torch.arange(count, device=device)[logits_to_keep.to(device)]
    raise Inexpressible("logits_to_keep is neither an int nor a 1-D tensor")


def _positions(position_ids: Tensor, sequences: int, count: int) -> Tensor:
    if tuple(position_ids.shape) not in ((1, count), (sequences, count)):
        raise Inexpressible(f"position_ids of shape {tuple(position_ids.shape)}")
    return position_ids.expand(sequences, count)


def _examine(
    mask: Tensor | None,
    position_ids: Tensor | None,
    cache: PagedCache,
    sequences: int,
    count: int,
    windowed: bool,
) -> tuple[Tensor | None, int]:
    """(which new tokens are not padding or None, the highest position); one device-to-host copy."""
    past, questions = cache.length, {}
    whole: Tensor | None = None
    if mask is not None:
        if mask.ndim != 2:
            raise Inexpressible(f"a {mask.ndim}-D attention_mask")
        if mask.shape != (sequences, past + count):
            raise Inexpressible(
                f"an attention_mask of shape {tuple(mask.shape)} for {past} cached and {count} new tokens"
            )
        whole = mask.bool()
        stored = whole[:, :past]
        changed = ~stored if cache.mask is None else stored != cache.mask
        questions["the attention_mask hides or shows other cached tokens than before"] = (
            changed.any()
        )
        if windowed:
            starts = whole[:, 1:] & ~whole[:, :-1]
            runs = starts.sum(1) + whole[:, 0]
            questions["the attention_mask has holes in a model with a sliding window"] = (
                runs > 1
            ).any()
    elif cache.mask is not None:
        raise Inexpressible("no attention_mask for a cache that holds padding")
    new = None if whole is None else whole[:, past:]
    if position_ids is not None and count > 1:
        steps = position_ids[:, 1:] - position_ids[:, :-1] != 1
        if new is not None:
            steps = steps & new[:, 1:] & new[:, :-1]
        questions["position_ids that do not count up by one (packed sequences)"] = steps.any()
    return _answers(questions, new, position_ids, past + count)


def _answers(
    questions: dict[str, Tensor], new: Tensor | None, position_ids: Tensor | None, length: int
) -> tuple[Tensor | None, int]:
    values = list(questions.values())
    if new is not None:
        values.append(new.all())
    if position_ids is not None and position_ids.numel():
        real = position_ids if new is None else position_ids.masked_fill(~new, 0)
        values.append(real.max())
        values.append(real.min())
    answers = torch.stack([v.long() for v in values]).tolist() if values else []
    for reason, bad in zip(questions, answers, strict=False):
        if bad:
            raise Inexpressible(reason)
    answers = answers[len(questions) :]
    if new is not None and answers.pop(0):
        new = None
    if not answers:
        return new, length - 1
    if answers[1] < 0:
        raise ValueError(f"position_ids must not be negative, got {answers[1]}")
    return new, answers[0]
