"""Interrupted training ends in the same bits, and training that diverges says where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pipeline import training_state
from pipeline.errors import InputError
from pipeline.recover.losses import Loss
from pipeline.recover.request import Schedule, _windows_needed, held_out
from pipeline.recover.train import Progress, _train_

SCHEDULE = Schedule(steps=12, batch_size=3, learning_rate=0.05, seed=3)
WINDOWS = torch.randint(0, 7, (10, 6), generator=torch.Generator().manual_seed(0))


class Bigrams(nn.Module):
    """The smallest language model, with one parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Parameter(torch.randn(7, 7, generator=generator))
        self.bias = nn.Parameter(torch.randn(7, generator=generator))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.table[batch[:, :-1]] * self.frozen + self.bias
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class Stop(Exception):
    """Stands for whatever ends a process."""


def stopping(loss: Loss, at: int) -> Loss:
    """The loss until its `at`-th call, counted from 0, which never returns."""
    calls = iter(range(at))

    def limited(batch: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise Stop
        return loss(batch)

    return limited


@pytest.fixture(autouse=True)
def saving_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "_SECONDS_BETWEEN_SAVES", 0.0)


def uninterrupted(folder: Path, schedule: Schedule = SCHEDULE) -> tuple[Bigrams, Progress]:
    model = Bigrams()
    path = folder / "uninterrupted.safetensors"
    return model, _train_(model, model.loss, WINDOWS, schedule, path)


def test_training_lowers_the_loss_and_leaves_frozen_parameters(tmp_path: Path) -> None:
    before = Bigrams().loss(WINDOWS).item()
    model, progress = uninterrupted(tmp_path)
    assert model.loss(WINDOWS).item() < before
    assert torch.equal(model.frozen, torch.ones(7))
    assert progress.step == len(progress.losses) == 12


@pytest.mark.parametrize("stops", [(0,), (1,), (7,), (11,), (2, 5, 1)])
def test_a_resumed_run_ends_in_the_same_bits(stops: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    for stop in stops:
        model = Bigrams()
        with pytest.raises(Stop):
            _train_(model, stopping(model.loss, stop), WINDOWS, SCHEDULE, path)
    model = Bigrams()
    progress = _train_(model, model.loss, WINDOWS, SCHEDULE, path)
    expected, record = uninterrupted(tmp_path)
    assert torch.equal(model.table, expected.table)
    assert torch.equal(model.bias, expected.bias)
    assert progress == record


def test_steps_that_were_taken_are_not_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    model = Bigrams()
    with pytest.raises(Stop):
        _train_(model, stopping(model.loss, 7), WINDOWS, SCHEDULE, path)
    again = Bigrams()
    # The state is from before the seventh update, which is taken again; then five are left.
    _train_(again, stopping(again.loss, 6), WINDOWS, SCHEDULE, path)


def test_between_saves_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "_SECONDS_BETWEEN_SAVES", 1e9)
    uninterrupted(tmp_path)
    assert list(tmp_path.iterdir()) == []


def poisoned(loss: Loss, at: int, value: float) -> Loss:
    """The loss, and at its `at`-th call one that is not finite, or has such a gradient."""
    calls = iter(range(at))

    def spoiled(batch: torch.Tensor) -> torch.Tensor:
        return loss(batch) if next(calls, None) is not None else loss(batch) * value

    return spoiled


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_state_before_it(
    value: float, tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    model = Bigrams()
    with pytest.raises(InputError, match="diverged") as caught:
        _train_(model, poisoned(model.loss, 5, value), WINDOWS, SCHEDULE, path)
    assert caught.value.details["where"] == "step 6"
    assert "--resume" in caught.value.details["change"]
    again = Bigrams()
    _train_(again, again.loss, WINDOWS, SCHEDULE, path)
    assert torch.equal(again.table, uninterrupted(tmp_path)[0].table)


def test_a_gradient_that_is_not_finite_is_noticed_under_a_finite_loss(tmp_path: Path) -> None:
    model = Bigrams()

    def kinked(batch: torch.Tensor) -> torch.Tensor:
        # The slope of the root is infinite at 0.
        return model.loss(batch) + (model.bias - model.bias.detach()).abs().sum().sqrt()

    with pytest.raises(InputError, match="diverged") as caught:
        _train_(model, kinked, WINDOWS, SCHEDULE, tmp_path / "state.safetensors")
    assert caught.value.details["where"] == "step 1"
    assert "from the start" in caught.value.details["change"]


def test_a_learning_rate_that_changed_is_recorded_with_its_step(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    model = Bigrams()
    with pytest.raises(Stop):
        _train_(model, stopping(model.loss, 7), WINDOWS, SCHEDULE, path)
    again = Bigrams()
    smaller = replace(SCHEDULE, learning_rate=0.01)
    progress = _train_(again, again.loss, WINDOWS, smaller, path)
    assert progress.learning_rates == {"0": 0.05, "6": 0.01}


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_broken_state_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    if content is None:  # that of another model
        other = nn.Linear(2, 2)
        _train_(other, lambda batch: other(batch[:, :2].float()).sum(), WINDOWS, SCHEDULE, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged") as caught:
        _train_(Bigrams(), Bigrams().loss, WINDOWS, SCHEDULE, path)
    assert "without --resume" in caught.value.details["change"]


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
    needed = _windows_needed(steps, batch)
    assert needed - held_out(needed) >= steps * batch
    # One of them at most could be spared.
    assert needed - 2 - held_out(max(1, needed - 2)) < steps * batch


@given(windows=st.integers(2, 1000))
def test_a_tenth_is_held_out_but_never_none_and_never_all(windows: int) -> None:
    assert 1 <= held_out(windows) < windows
    assert held_out(windows) in {1, windows // 10}
