"""What a step's kernels read: one device buffer, filled by one copy from pinned host memory.

The tensors in it keep their addresses, so that captured graphs can read them. The host knows only the
sequences; `expand_step` makes positions, cache slots and page tables of them on the device, and puts
in the tokens that were drawn in the step before and that the host has not read yet.

    offset  field                          per
    0       logit_rows, seeds, offsets,    drawn row         int64
            drawn_rows
            temperature, top_p, min_p      drawn row         float32
            top_k                          drawn row         int32
            seq_lens, rows, cu_seqlens_q   sequence          int32
            ids                            token             int64, last: only as many as there are
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tlk.models.batch import PagedKV

_FIELDS: dict[str, type[np.generic]] = {
    "logit_rows": np.int64,
    "seeds": np.int64,
    "offsets": np.int64,
    "drawn_rows": np.int64,
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "top_k": np.int32,
    "seq_lens": np.int32,
    "rows": np.int32,
    "cu_seqlens_q": np.int32,
    "ids": np.int64,
}
_ALIGNMENT = 64


class Inputs:
    """The step's inputs on the device, and their image on the host."""

    logit_rows: Tensor
    seeds: Tensor
    offsets: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    drawn_rows: Tensor
    seq_lens: Tensor
    rows: Tensor
    cu_seqlens_q: Tensor
    ids: Tensor

    def __init__(self, max_seqs: int, max_tokens: int, device: torch.device) -> None:
        self.device = device
        counts = dict.fromkeys(_FIELDS, max_seqs) | {
            "cu_seqlens_q": max_seqs + 1,
            "ids": max_tokens,
        }
        offsets, end = {}, 0
        for name, kind in _FIELDS.items():
            offsets[name] = end
            end += -(-counts[name] * np.dtype(kind).itemsize // _ALIGNMENT) * _ALIGNMENT
        self._ids_at = offsets["ids"]
        self._image = np.zeros(end, np.uint8)
        self._buffer = torch.zeros(end, dtype=torch.uint8, device=device)
        self.host: dict[str, np.ndarray] = {}
        for name, kind in _FIELDS.items():
            start, stop = offsets[name], offsets[name] + counts[name] * np.dtype(kind).itemsize
            self.host[name] = self._image[start:stop].view(kind)
            dtype = torch.from_numpy(self.host[name]).dtype
            setattr(self, name, self._buffer[start:stop].view(dtype))

    def send(self, tokens: int) -> None:
        """Copy the host's image, with its first `tokens` ids, to the device; does not wait."""
        end = self._ids_at + 8 * tokens
        self._buffer[:end].copy_(upload(self._image[:end], self.device), non_blocking=True)


class Expanded:
    """What `expand_step` writes for a step: addresses stay, contents change."""

    def __init__(
        self,
        groups: Sequence[PagedKV],
        max_seqs: int,
        max_tokens: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.ids = empty(max_tokens, dtype=torch.int64)
        self.positions = empty(max_tokens, dtype=torch.int64)
        self.slots = [empty(max_tokens, dtype=torch.int64) for _ in groups]
        self.tables = [empty(max_seqs, max_pages, dtype=torch.int32) for _ in groups]


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of `array` for a copy to `device` that the host does not wait for.

    Its memory is pinned, and torch's allocator reuses it only when the copy is done.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory()


def to_device(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """int64 `values` on `device`, enqueued and not waited for."""
    return upload(np.asarray(values, np.int64), device).to(device, non_blocking=True)
