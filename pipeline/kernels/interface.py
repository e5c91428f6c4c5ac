"""The C interfaces of the kernel libraries: their structures, and functions with their types."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
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
    library = _load(path, "skipcatBlockSkipLinear")
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
    _require_same_structures(library.skipcatStructBytes, (Problem, Pointers, Device), path)
    return library


class LatentProblem(ctypes.Structure):
    """`skipcat::latent::Problem`, with its two `skipcat::latent::Side`."""

    _fields_: ClassVar = [
        ("batch", c_int32),
        ("heads", c_int32),
        ("queries", c_int32),
        ("slots", c_int32),
        ("width", c_int32),
        ("heads_per_group", c_int32),
        ("key_groups", c_int32),
        ("key_held", c_int32),
        ("key_form", c_int32),
        ("value_groups", c_int32),
        ("value_held", c_int32),
        ("value_form", c_int32),
        ("mask_by_row", ctypes.c_bool),
        ("bf16", ctypes.c_bool),
    ]


class LatentPointers(ctypes.Structure):
    """`skipcat::latent::Pointers`."""

    _fields_: ClassVar = [
        (name, c_void_p)
        for name in (
            "query", "mask", "keys", "key_steps", "values", "value_steps",
            "up", "mean", "cos", "sin", "mixed",
        )
    ]  # fmt: skip


def open_latent_library(path: Path) -> ctypes.CDLL:
    """Load the library of latent attention and give its functions their types.

    Raises:
        InputError: it does not load, or was built from another version of `latent_attention.h`.
    """
    library = _load(path, "skipcatLatentAttention")
    library.skipcatLatentWhyRefused.argtypes = [POINTER(LatentProblem)]
    library.skipcatLatentWhyRefused.restype = c_char_p
    library.skipcatLatentWorkspaceBytes.argtypes = [POINTER(LatentProblem), c_int32]
    library.skipcatLatentWorkspaceBytes.restype = c_size_t
    library.skipcatLatentAttention.argtypes = [
        POINTER(LatentProblem), POINTER(LatentPointers), c_int32, c_void_p, c_void_p,
    ]  # fmt: skip
    structures = (LatentProblem, LatentPointers)
    _require_same_structures(library.skipcatLatentStructBytes, structures, path)
    return library


def _load(path: Path, entry: str) -> ctypes.CDLL:
    """A library whose `entry` answers with a CUDA status.

    Raises:
        InputError: it does not load, or has no such function.
    """
    try:
        library = ctypes.CDLL(str(path))
        getattr(library, entry).restype = c_int
    except (OSError, AttributeError) as error:
        raise InputError(
            "The kernel library does not load.",
            where=path,
            observed=str(error),
            change="delete it: it is built again when it is next needed",
        ) from error
    return library


def _require_same_structures(
    tell: Callable[..., None], kinds: tuple[type[ctypes.Structure], ...], path: Path
) -> None:
    """Raise InputError when the library's structures have other sizes than those of this file."""
    sizes = [c_size_t() for _ in kinds]
    tell(*(byref(size) for size in sizes))
    observed = [size.value for size in sizes]
    expected = [ctypes.sizeof(kind) for kind in kinds]
    if observed != expected:
        raise InputError(
            "The kernel library is from another version of skipcat.",
            where=path,
            observed=f"structures of {observed} bytes",
            expected=f"{expected} bytes",
            change="delete it: it is built again when it is next needed",
        )
