"""Stands for Transformer Engine's package where it cannot be installed: any name in it is an empty module class.

With it Core builds the block specs of Transformer Engine, whose classes are Core's own subclasses of these. Nothing can
be run, and constructing them proves nothing; which class stands where does not need either.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import ClassVar

import torch

PACKAGE = "transformer_engine"


class _FakeModule(ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "2.19.0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value: object = (
            type(name, (torch.nn.Module,), {}) if name[0].isupper() else _FakeModule(f"{self.__name__}.{name}")
        )
        setattr(self, name, value)
        return value

    def __call__(self, *args: object, **kwargs: object) -> object:
        """A decorator or function of the package, used while Core is imported: leaves its argument alone."""
        return args[0] if args else self


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == PACKAGE:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _FakeModule(spec.name)

    def exec_module(self, module) -> None:
        """There is nothing to run."""


def install() -> None:
    """Make ``import transformer_engine`` find the fake; before any import of Megatron, in a process of its own."""
    assert not any(name.startswith("megatron.core") for name in sys.modules)
    sys.meta_path.insert(0, _Finder())
