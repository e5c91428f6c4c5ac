"""Collecting garbage in a process that has lived long: what is there already is set aside."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Inside, `gc` neither walks nor lists what was there before.

    Other tests leave millions of objects, and to walk them takes a second each time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
