"""Calibration data: texts, a JSONL file of them, or token ids, as rows of token ids of one length."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAMPLES, LENGTH = 128, 2048
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """ids int64 [n, length], and in words where they come from."""

    ids: Tensor
    description: str

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def read_calibration(
    data: Any,
    encode: Encode | None,
    *,
    vocab_size: int,
    samples: int = SAMPLES,
    length: int = LENGTH,
) -> Calibration:
    """At most `samples` rows of `length` tokens from `data`, in its order.

    data: texts; the path of a JSONL file, each of whose lines is a text or an object with a field
    "text"; or token ids [n, any length], a tensor or lists of equal length. Texts are encoded, joined
    and cut, what is left over at the end is dropped; ids are used as they are, `samples` rows of them.
    `encode` gives the ids of a text. Nothing is downloaded: a name that is no file is an error.

    Raises ValueError where there is no text, less of it than one row, or an id that is not below
    `vocab_size`; TypeError for anything else than texts and ids.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ValueError(f"calibration {name} must be at least 1, got {value}")
    if _are_ids(data):
        return _from_ids(data, vocab_size, samples)
    if encode is None:
        raise ValueError("calibration must be token ids here: there is no tokenizer for texts")
    rows, source = _cut(_texts(data), encode, samples, length), _source(data)
    n, left = rows
    if not n:
        raise ValueError(
            f"calibration must hold at least {length} tokens, one row, got {left} from {source}"
        )
    return Calibration(torch.tensor(n), f"{len(n)} × {length} tokens of {source}")


def _are_ids(data: Any) -> bool:
    if isinstance(data, Tensor):
        return True
    first = data[0] if isinstance(data, Sequence) and not isinstance(data, str) and data else None
    return first is not None and not isinstance(first, str)


def _from_ids(data: Any, vocab_size: int, samples: int) -> Calibration:
    try:
        ids = torch.as_tensor(data)
    except (TypeError, ValueError) as error:
        raise TypeError(f"calibration must be texts or token ids of one length: {error}") from error
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2:
        raise TypeError(
            f"calibration ids must be integers [n, length], got {ids.dtype} {tuple(ids.shape)}"
        )
    if not ids.numel():
        raise ValueError(f"calibration must hold at least one token, got {tuple(ids.shape)}")
    ids = ids[:samples].long().cpu()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(
            f"calibration ids must be in 0..{vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    return Calibration(ids, f"{ids.shape[0]} × {ids.shape[1]} token ids")


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str | Path):
        yield from _lines(Path(data).expanduser())
        return
    if not isinstance(data, Iterable):
        raise TypeError(f"calibration must be texts, a file or ids, got {type(data).__name__}")
    for i, text in enumerate(data):
        if not isinstance(text, str):
            raise TypeError(f"calibration[{i}] must be a string, got {type(text).__name__}")
        yield text


def _lines(file: Path) -> Iterator[str]:
    if not file.is_file():
        raise ValueError(f"calibration must be an existing JSONL file, there is no {file}")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
            text = value.get("text") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise ValueError(f'{file}, line {number} is neither a text nor has it a "text"')
            yield text


def _cut(
    texts: Iterator[str], encode: Encode, samples: int, length: int
) -> tuple[list[list[int]], int]:
    """Rows of ids, and how many tokens are left over; no more is read than is needed."""
    rows: list[list[int]] = []
    rest: list[int] = []
    for text in texts:
        rest += encode(text)
        while len(rest) >= length and len(rows) < samples:
            rows.append(rest[:length])
            del rest[:length]
        if len(rows) == samples:
            break
    return rows, len(rest)


def _source(data: Any) -> str:
    return str(data) if isinstance(data, str | Path) else "the texts given"
