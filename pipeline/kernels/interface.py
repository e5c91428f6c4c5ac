"""The C interface of the kernel library: its structures, and its functions with their types."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import ClassVar

from pipeline.errors import InputError

FP16, BF16 = 0, 1
FLOAT_WEIGHTS = 0  # as they are; those of codes are their bits


class Problem(ctypes.Structure):
    """`skipcat::Problem`, with its two `skipcat::WeightFormat`."""

    _fields_: ClassVar = [
        ("rows", c_int32),
        ("n", c_int32),
        ("m", c_int32),
        ("rank", c_int32),
        ("type", c_int32),
        ("a_weights", c_int32),
        ("a_group", c_int32),
        ("b_weights", c_int32),
        ("b_group", c_int32),
        ("indexed", ctypes.c_bool),
        ("tactic", c_int32),
    ]


class Pointers(ctypes.Structure):
    """`skipcat::Pointers`."""

    _fields_: ClassVar = [
        (name, c_void_p) for name in ("x", "index", "a", "a_scale", "b", "b_scale", "y")
    ]


class Device(ctypes.Structure):
    """`skipcat::Device`."""

    _fields_: ClassVar = [("multiprocessors", c_int32), ("capability", c_int32)]


def open_library(path: Path) -> ctypes.CDLL:
    """Load the kernel library and give its functions their types.

    Raises:
        InputError: it does not load, or was built from another version of `block_skip.h`.
    """
    try:
        library = ctypes.CDLL(str(path))
        library.skipcatBlockSkipLinear.restype = c_int
    except (OSError, AttributeError) as error:
        raise InputError(
            "The kernel library does not load.",
            where=path,
            observed=str(error),
            change="delete it: it is built again when it is next needed",
        ) from error
    library.skipcatWhyRefused.argtypes = [POINTER(Problem)]
    library.skipcatWhyRefused.restype = c_char_p
    library.skipcatWorkspaceBytes.argtypes = [POINTER(Problem), POINTER(Device)]
    library.skipcatWorkspaceBytes.restype = c_size_t
    library.skipcatCounterBytes.argtypes = [POINTER(Problem)]
    library.skipcatCounterBytes.restype = c_size_t
    library.skipcatMakeCounters.argtypes = [c_int, c_size_t, POINTER(c_void_p)]
    library.skipcatMakeCounters.restype = c_int
    library.skipcatBlockSkipLinear.argtypes = [
        POINTER(Problem), POINTER(Pointers), POINTER(Device), c_void_p, c_void_p, c_void_p,
    ]  # fmt: skip
    _require_same_structures(library, path)
    return library


def _require_same_structures(library: ctypes.CDLL, path: Path) -> None:
    """Raise InputError when the library's structures have other sizes than those of this file."""
    sizes = [c_size_t() for _ in range(3)]
    library.skipcatStructBytes(*(byref(size) for size in sizes))
    observed = [size.value for size in sizes]
    expected = [ctypes.sizeof(kind) for kind in (Problem, Pointers, Device)]
    if observed != expected:
        raise InputError(
            "The kernel library is from another version of skipcat.",
            where=path,
            observed=f"structures of {observed} bytes",
            expected=f"{expected} bytes",
            change="delete it: it is built again when it is next needed",
        )
