import sys
from pathlib import Path

import pytest
import triton

from tlk.kernels import flash_attention_sm90, gluon
from tlk.kernels.gluon import gluon_kernels


def test_all_of_them_are_found():
    folder = Path(gluon.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if "gluon.jit" in path.read_text()}
    files -= {"gluon", *(name for name in files if "sm90_" in name)}  # this text, parts of kernels
    assert {f"{name}_sm90" for name in gluon_kernels()} == {name.strip("_") for name in files}


@pytest.mark.parametrize("reason", [None, "untested"])
def test_each_says_itself_why_it_cannot_run(monkeypatch, reason):
    monkeypatch.setattr(flash_attention_sm90, "missing", lambda: reason)
    assert gluon_kernels()["flash_attention"] == reason


def test_a_module_that_cannot_be_imported_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tlk.kernels.flash_attention_sm90", None)
    reason = gluon_kernels()["flash_attention"]
    assert reason.startswith(f"triton {triton.__version__} has another Gluon: import of")
