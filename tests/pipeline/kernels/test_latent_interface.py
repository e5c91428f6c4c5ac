"""The C interface of latent attention, compiled for the CPU, against float64 in NumPy."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.kernels.build import LATENT_ATTENTION
from pipeline.kernels.interface import LatentPointers, LatentProblem, open_latent_library
from tests.support.emulated import compile_library
from trt_plugins.latent_attention.reference import Held, Rebuilt, latent_attention

MULTIPROCESSORS = 4
CLOSED = -32768.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("latent")
    return open_latent_library(compile_library(folder, LATENT_ATTENTION))


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins on 16 bytes, as memory of a device does."""
    room = np.zeros(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    placed = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed


def computed(
    library: Any, heads: int, query: np.ndarray, mask: np.ndarray, keys: Held, values: Held,
    rebuilt: Rebuilt | None,
) -> np.ndarray:  # fmt: skip
    """What the library makes of a call of batch 1."""
    problem = LatentProblem(
        batch=1, heads=heads, queries=query.shape[2], slots=keys.held.shape[2],
        width=query.shape[3], heads_per_group=0 if rebuilt is None else 1,
        key_groups=keys.held.shape[1], key_held=keys.held.shape[3], key_form=form(keys),
        value_groups=values.held.shape[1], value_held=values.held.shape[3],
        value_form=form(values),
    )  # fmt: skip
    rank = values.held.shape[3] * (2 if values.paired else 1)
    mixed = np.full((1, heads, query.shape[2], rank), np.nan, np.float16)
    given = {
        "query": query, "mask": mask, "keys": keys.held, "key_steps": keys.steps,
        "values": values.held, "value_steps": values.steps, "mixed": mixed,
        **({} if rebuilt is None else vars(rebuilt)),
    }  # fmt: skip
    memory = {name: aligned(array) for name, array in given.items() if array is not None}
    pointers = LatentPointers(**{name: array.ctypes.data for name, array in memory.items()})
    assert library.skipcatLatentWhyRefused(ctypes.byref(problem)) is None
    needed = library.skipcatLatentWorkspaceBytes(ctypes.byref(problem), MULTIPROCESSORS)
    workspace = np.full(needed, 0xFF, np.uint8)  # NaN
    status = library.skipcatLatentAttention(
        ctypes.byref(problem), ctypes.byref(pointers), MULTIPROCESSORS, workspace.ctypes.data, None
    )
    assert status == 0
    return memory["mixed"]


def form(side: Held) -> int:
    return 0 if side.steps is None else 4 if side.paired else 8


def drawn_side(random: np.random.Generator, groups: int, places: int, rank: int, bits: int) -> Held:
    if bits == 16:
        return Held(random.standard_normal((1, groups, places, rank)).astype(np.float16))
    codes = random.integers(-128, 128, (1, groups, places, rank * bits // 8), dtype=np.int8)
    spread = random.uniform(2, 4, (1, groups, places, 2))
    steps = (spread * [1 / (2**bits - 1), -0.5]).astype(np.float16)
    return Held(codes, steps, paired=bits == 4)


def drawn_tables(
    random: np.random.Generator, groups: int, places: int, rank: int, width: int
) -> Rebuilt:
    angles = np.arange(places)[:, None] * 1e4 ** -np.linspace(0, 1, width // 2)
    return Rebuilt(
        (random.standard_normal((groups, 1, rank, width)) / rank**0.5).astype(np.float16),
        (0.5 * random.standard_normal((groups, 1, 1, width))).astype(np.float16),
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("heads", "groups", "queries", "places", "bits", "is_rebuilt"),
    [
        (8, 2, 1, 200, 16, False),  # heads of a group are the rows of a tile
        (8, 2, 1, 200, 16, True),
        (4, 1, 5, 77, 8, False),  # one head of keys, a draft
        (4, 1, 5, 77, 4, True),
        (6, 6, 8, 130, 4, False),  # a head of keys each
        (3, 3, 1, 1, 16, True),  # one place
    ],
)
def test_every_form_agrees_with_the_reference(
    library: Any, heads: int, groups: int, queries: int, places: int, bits: int, is_rebuilt: bool
) -> None:
    random = np.random.default_rng(heads * places)
    key_rank, value_rank, width = 32, 64, 64
    keys = drawn_side(random, groups, places, key_rank, bits)
    values = drawn_side(random, groups, places, value_rank, bits)
    rebuilt = drawn_tables(random, groups, places, key_rank, width) if is_rebuilt else None
    wide = width if is_rebuilt else key_rank
    query = (random.standard_normal((1, heads, queries, wide)) / wide**0.5).astype(np.float16)
    last = places - queries + np.arange(queries)
    mask = np.where(np.arange(places) > last[:, None], CLOSED, 0)[None, None].astype(np.float16)
    found = computed(library, heads, query, mask, keys, values, rebuilt)
    exact = latent_attention(query, mask, keys, values, rebuilt)
    # Weights, turned keys and results are rounded to half: 2^-12 each, of scores of size one.
    assert np.linalg.norm(found - exact) <= 1.5e-3 * np.linalg.norm(exact)


def test_what_cannot_be_computed_is_refused_with_the_reason(library: Any) -> None:
    problem = LatentProblem(
        batch=1, heads=4, queries=1, slots=16, width=40, heads_per_group=1,
        key_groups=2, key_held=32, value_groups=2, value_held=32,
    )  # fmt: skip
    assert b"multiple of 16" in library.skipcatLatentWhyRefused(ctypes.byref(problem))
    problem.width, problem.heads = 32, 5
    assert b"divide the heads" in library.skipcatLatentWhyRefused(ctypes.byref(problem))
    nothing = LatentPointers()
    problem.heads = 4
    status = library.skipcatLatentAttention(
        ctypes.byref(problem), ctypes.byref(nothing), MULTIPROCESSORS, 16, None
    )
    assert status == 1  # cudaErrorInvalidValue


def test_every_header_is_part_of_the_name() -> None:
    # A library is built again when a header changes; one that was forgotten would go unseen.
    own = LATENT_ATTENTION.folders[0]
    kernels = {path.name for path in own.glob("*.cuh")} | {"latent_attention.h"}
    assert kernels <= {*LATENT_ATTENTION.headers}
    included = {
        line.split('"')[1]
        for name in (*LATENT_ATTENTION.headers, *LATENT_ATTENTION.sources)
        for line in LATENT_ATTENTION.find(name).read_text().splitlines()
        if line.startswith('#include "') and not line.startswith('#include "emulate')
    }
    assert {Path(name).name for name in included} <= {*LATENT_ATTENTION.headers}
