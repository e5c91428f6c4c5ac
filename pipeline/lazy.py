"""Things named as `module:name`, imported when they are asked for: no module pays for another."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def imported(reference: str) -> Any:
    """The object that `package.module:name` stands for; its module is imported now."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def make_callable(package: str, reference: str) -> None:
    """Let a package of `pipeline` be called as the function that a reference stands for.

    The attribute `pipeline.compress` cannot hold a function: importing `pipeline.compress.run` puts
    the package there, so that the order of imports would decide which of the two a caller finds.
    A package that can be called is both, in any order.
    """

    def call(*arguments: Any, **settings: Any) -> Any:
        return imported(reference)(*arguments, **settings)

    members = {"__call__": staticmethod(call), "__doc__": sys.modules[package].__doc__}
    sys.modules[package].__class__ = type("CallablePackage", (ModuleType,), members)
