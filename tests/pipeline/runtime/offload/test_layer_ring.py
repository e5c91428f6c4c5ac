"""Layers come in their order whatever happens, and the thread ends with the ring."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.runtime.offload.layer_ring import LayerRing
from pipeline.runtime.offload.weight_reader import Layout, WeightReader, lay_out

LAYERS, BYTES = 5, 8192


class Slow(WeightReader):
    """A reader that takes its time, and fails when it is told to."""

    pause_s = 0.0
    failing = False

    def read(self, layout: Layout, buffer: np.ndarray, stopped=lambda: False) -> None:  # type: ignore[no-untyped-def]
        time.sleep(self.pause_s)
        if self.failing:
            raise InputError("The disk is gone.")
        super().read(layout, buffer, stopped)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Slow]:
    """A file whose layers consist of their numbers."""
    path = tmp_path / "weights"
    path.write_bytes(b"".join(bytes([number]) * BYTES for number in range(LAYERS)))
    found = Slow([path])
    yield found
    found.close()


def layouts() -> list[Layout]:
    return [lay_out({"w": (0, n * BYTES, (n + 1) * BYTES)}) for n in range(LAYERS)]


def taken(ring: LayerRing, count: int, pause_s: float = 0.0) -> list[int]:
    """The numbers that the next buffers consist of, looked at after a while."""
    found = []
    for _ in range(count):
        buffer = ring.take()
        time.sleep(pause_s)
        assert len(set(buffer[:BYTES].tolist())) == 1
        found.append(int(buffer[0]))
        ring.release()
    return found


@pytest.mark.parametrize(("read_s", "compute_s"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.01)])
def test_layers_come_round_and_round_and_none_is_overwritten(
    reader: Slow, read_s: float, compute_s: float
) -> None:
    reader.pause_s = read_s
    ring = LayerRing(reader, layouts())
    assert taken(ring, 13, compute_s) == [n % LAYERS for n in range(13)]
    ring.close()


def test_a_pass_that_was_broken_off_is_followed_by_a_whole_one(reader: Slow) -> None:
    ring = LayerRing(reader, layouts())
    for broken in range(LAYERS + 2):
        taken(ring, broken)
        ring.take()  # and not given back
        ring.restart()
        assert taken(ring, LAYERS) == list(range(LAYERS))
        ring.restart()
    ring.close()


def test_a_failure_is_raised_where_the_layer_is_wanted_and_a_restart_tries_again(
    reader: Slow,
) -> None:
    ring = LayerRing(reader, layouts())
    taken(ring, 2)
    reader.failing = True
    with pytest.raises(InputError, match="disk is gone"):
        taken(ring, LAYERS)
    reader.failing = False
    ring.restart()
    assert taken(ring, LAYERS) == list(range(LAYERS))
    ring.close()


def test_the_thread_ends_when_the_ring_is_closed_or_forgotten(reader: Slow) -> None:
    before = threading.active_count()
    ring = LayerRing(reader, layouts())
    taken(ring, 1)
    ring.close()
    ring.close()
    with pytest.raises(RuntimeError):
        taken(ring, 3)
    ring = LayerRing(reader, layouts())
    assert threading.active_count() == before + 1
    del ring
    gc.collect()
    assert threading.active_count() == before
