"""Layers come in their order whatever the streams do first, and each missing wait is found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pipeline.runtime.offload.device_ring import DeviceRing
from tests.support.lazy_device import LazyDevice, forget, release_first

BYTES, TURNS = 16, 17
# Of the stream of copies: it does nothing before it has to, something, or all that it may.
EAGERNESS = (0.0, 0.5, 1.0)


def slabs(count: int) -> list[torch.Tensor]:
    """Layers that consist of their numbers, the last one shorter."""
    sizes = [BYTES] * (count - 1) + [BYTES // 2]
    return [torch.full((size,), n, dtype=torch.uint8) for n, size in enumerate(sizes)]


def computed(
    device: LazyDevice, count: int, turns: int = TURNS, ring: DeviceRing | None = None
) -> list[list[int]]:
    """What is computed with, turn by turn, where both streams are as late as they like."""
    ring = DeviceRing(device, slabs(count)) if ring is None else ring
    seen: list[list[int]] = []
    for _ in range(turns):
        buffer = ring.take()
        device.compute(partial(_look, buffer, seen, True))
        device.compute(partial(_look, buffer, seen, False))
        ring.release()
    device.finish()
    return seen


def _look(buffer: torch.Tensor, seen: list[list[int]], is_first: bool) -> None:
    """Compute with a buffer, in two steps."""
    seen.extend([[]] * is_first)
    seen[-1] = seen[-1] + buffer[: BYTES // 2].tolist()


def expected(count: int, turns: int = TURNS) -> list[list[int]]:
    return [[n % count] * BYTES for n in range(turns)]


@pytest.mark.parametrize("eagerness", EAGERNESS)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_layers_come_round_and_round_and_none_is_overwritten(count: int, eagerness: float) -> None:
    for seed in range(40):
        device = LazyDevice(seed, eagerness, deferred=True)
        assert computed(device, count) == expected(count)


def test_a_pass_that_was_broken_off_is_followed_by_a_whole_one() -> None:
    for seed in range(40):
        device = LazyDevice(seed, deferred=True)
        ring = DeviceRing(device, slabs(5))
        for broken in range(7):
            computed(device, 5, broken, ring)
            ring.take()  # and not released
            ring.restart()
            assert computed(device, 5, 5, ring) == expected(5, 5)
            ring.restart()


def test_what_was_copied_is_counted() -> None:
    device = LazyDevice(deferred=True)
    ring = DeviceRing(device, slabs(3))
    computed(device, 3, 6, ring)
    # Two turns of all three, and the two that are on their way again.
    assert ring.copied_bytes == 2 * (2 * BYTES + BYTES // 2) + 2 * BYTES
    assert device.copies == 8


def _mark_copies_first(patch: pytest.MonkeyPatch) -> None:
    """A ring whose buffers are said to be filled before their copies are made."""
    copy, mark = LazyDevice.copy, LazyDevice.mark_copies
    early: dict[LazyDevice, Any] = {}

    def copied(self: LazyDevice, buffer: torch.Tensor, source: torch.Tensor) -> None:
        early[self] = mark(self)
        copy(self, buffer, source)

    patch.setattr(LazyDevice, "copy", copied)
    patch.setattr(LazyDevice, "mark_copies", lambda self: early[self])


@pytest.mark.parametrize(
    "fault",
    [forget("hold_compute"), forget("hold_copies"), release_first, _mark_copies_first],
    ids=["filled", "released", "released first", "filled first"],
)
def test_a_wait_that_is_missing_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    for eagerness in EAGERNESS:
        found = [computed(LazyDevice(seed, eagerness, deferred=True), 5) for seed in range(40)]
        if any(each != expected(5) for each in found):
            return
    pytest.fail("no order of the streams shows it")
