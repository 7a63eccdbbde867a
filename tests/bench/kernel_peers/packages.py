"""Packages that are not installed, as modules of fakes."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def install(monkeypatch, name, **members):
    """Put a module called `name` with these members where imports find it, and its parents."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            install(monkeypatch, parent)
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    return module
