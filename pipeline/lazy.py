"""What a table names as `module:name`, imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any


def imported(reference: str) -> Any:
    """The object that `package.module:name` stands for; its module is imported now."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
