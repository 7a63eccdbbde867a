"""The text behind the embedded model: the source of Python's own standard library.

Every machine that runs tlk has this text, so the model can be trained and judged anywhere without
a download. Both lists are fixed: modules that every CPython 3.11, 3.12 and 3.13 has as plain source,
also where a Linux distribution splits the library into packages. Modules of tables (encodings,
locale, pydoc_data) teach no code and are left out. `HELD_OUT` is never trained on; its bits per byte
are the standing test of quality.
"""

import hashlib
import math
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tlk.errors import UnsupportedError

HELD_OUT = (
    "argparse",
    "calendar",
    "configparser",
    "csv",
    "dataclasses",
    "fractions",
    "graphlib",
    "heapq",
    "queue",
    "shlex",
    "statistics",
    "textwrap",
)
_TRAINING = """
__future__ _collections_abc _compat_pickle _compression _markupbase _osx_support _py_abc
_pydecimal _pyio _sitebuiltins _strptime _threading_local _weakrefset abc ast asyncio base64 bdb
bisect bz2 cProfile cmd code codecs codeop collections colorsys compileall concurrent contextlib
contextvars copy copyreg ctypes curses datetime dbm decimal difflib dis doctest email enum
filecmp fileinput fnmatch ftplib functools genericpath getopt getpass gettext glob gzip hashlib
hmac html http imaplib importlib inspect io ipaddress json keyword linecache logging lzma
mailbox mimetypes modulefinder multiprocessing netrc ntpath nturl2path numbers opcode operator
optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint
profile pstats pty py_compile pyclbr pydoc quopri random re reprlib rlcompleter runpy sched
secrets selectors shelve shutil signal site smtplib socket socketserver sqlite3 ssl stat string
struct subprocess symtable sysconfig tabnanny tarfile tempfile threading timeit token tokenize
tomllib trace traceback tracemalloc tty turtle types typing unittest urllib uuid venv warnings
wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
"""
TRAINING = tuple(_TRAINING.split())
_NOT_TEXT = {"test", "tests", "__pycache__", "entities.py"}  # html.entities is one table


def texts(names: Iterable[str]) -> dict[str, str]:
    """The source of the modules and packages `names`, by path in the library, in a fixed order.

    Raises UnsupportedError if this Python does not ship the source of one of them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for name in names
        for path in _files(root, name)
    }


def _files(root: Path, name: str) -> list[Path]:
    module = root / f"{name}.py"
    if module.is_file():
        return [module]
    found = [
        path
        for path in sorted((root / name).rglob("*.py"))
        if not _NOT_TEXT & set(path.relative_to(root).parts)
    ]
    if not found:
        raise UnsupportedError(f"this Python has no source of its module {name} under {root}")
    return found


def sha256(text: str) -> str:
    """The digest that says which version of a file was measured."""
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def held_out_bits_per_byte(
    model: Any,
    tokenizer: Any,
    *,
    window: int = 512,
    stride: int = 256,
    batch: int = 16,
    bytes_per_module: int | None = None,
) -> float:
    """How many bits `model` needs for a byte of the held-out modules: lower is better.

    Each module is read in windows of `window` tokens that move by `stride`. A window scores only the
    tokens that the one before it did not, so every token but a module's first ones sees at least
    `window` - `stride` tokens before it. `model` is any causal language model of transformers in
    eval mode, optimized by tlk or not; it is called with ids [batch, window] and no cache.
    `bytes_per_module` judges only the start of each module, for a quick look. Nothing is random.
    """
    if not 0 < stride <= window:
        raise ValueError(f"stride must be in 1..window ({window}), got {stride}")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows, n_bytes = [], 0
    for text in texts(HELD_OUT).values():
        part = text.encode()[:bytes_per_module].decode(errors="ignore")
        n_bytes += len(part.encode())
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        rows += list(_windows([start, *ids], window, stride))
    nats = 0.0
    for i in range(0, len(rows), batch):
        nats += _nats(model, torch.tensor(rows[i : i + batch]))
    return nats / math.log(2) / n_bytes


def _windows(ids: list[int], window: int, stride: int) -> Iterator[list[list[int]]]:
    """Rows of inputs and targets [2, window]; a target of -100 is not scored."""
    scored = 0
    for begin in range(0, max(1, len(ids) - 1 - window + stride), stride):
        inputs, targets = ids[begin : begin + window], ids[begin + 1 : begin + 1 + window]
        new = [t if begin + i >= scored else -100 for i, t in enumerate(targets)]
        scored = begin + len(targets)
        yield [
            inputs + [ids[0]] * (window - len(inputs)),
            new + [-100] * (window - len(targets)),
        ]


def _nats(model: Any, rows: Tensor) -> float:
    inputs, targets = rows.to(model.device).unbind(1)
    logits = model(input_ids=inputs.contiguous(), use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
