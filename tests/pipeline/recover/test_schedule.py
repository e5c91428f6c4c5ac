from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recover.schedule import Schedule, held_out, windows_needed


@given(batch=st.integers(1, 6), extra=st.integers(0, 20), seed=st.integers(0, 5))
def test_every_window_is_read_once_before_any_is_read_again(
    batch: int, extra: int, seed: int
) -> None:
    count = batch + extra
    schedule = Schedule(100, batch, 1e-3, seed)
    per_epoch = count // batch
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        read = np.concatenate([schedule.windows_at(step, count) for step in steps])
        assert len(set(read.tolist())) == len(read) == per_epoch * batch
        assert set(read.tolist()) <= set(range(count))


def test_a_step_reads_the_same_windows_whenever_it_is_asked() -> None:
    first, second = Schedule(50, 4, 1e-3, 7), Schedule(50, 4, 1e-3, 7)
    forwards = [first.windows_at(step, 21).tolist() for step in range(50)]
    backwards = [second.windows_at(step, 21).tolist() for step in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards[:5] != forwards[5:10]


@given(steps=st.integers(1, 2000))
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_zero(steps: int) -> None:
    schedule = Schedule(steps, 1, 2e-4, 0)
    rates = [schedule.rate_at(step) for step in range(steps)]
    peak = int(np.argmax(rates))
    assert max(rates) == 2e-4
    assert min(rates) > 0
    assert np.all(np.diff(rates[: peak + 1]) >= 0)
    assert np.all(np.diff(rates[peak:]) <= 0)
    if steps > 100:
        assert rates[-1] < 1e-3 * 2e-4


@given(steps=st.integers(1, 300), batch=st.integers(1, 9))
def test_the_windows_needed_let_each_step_read_new_ones(steps: int, batch: int) -> None:
    needed = windows_needed(steps, batch)
    assert needed - held_out(needed) >= steps * batch
    # One of them at most could be spared.
    assert needed - 2 - held_out(max(1, needed - 2)) < steps * batch


@given(windows=st.integers(2, 1000))
def test_a_tenth_is_held_out_but_never_none_and_never_all(windows: int) -> None:
    assert 1 <= held_out(windows) < windows
    assert held_out(windows) in {1, windows // 10}
