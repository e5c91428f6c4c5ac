"""Losses are what they are called, and the same bits wherever they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.recover.losses import _distillation_loss, _next_token_loss, measured_losses
from pipeline.workers.workers import IN_PROCESS
from tests.support.elsewhere import Elsewhere
from tests.support.families import FAMILIES, tiny_model

WINDOWS = torch.randint(3, 250, (5, 12), generator=torch.Generator().manual_seed(1))


# float32 sums of some tens of terms against float64 ones.
TOLERANCE = 1e-5


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed))


def probabilities(logits: torch.Tensor) -> np.ndarray:
    exponentials = np.exp(logits.double().numpy())
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_next_token_loss_scores_each_token_by_the_logits_before_it() -> None:
    logits, tokens = random_logits(0), torch.randint(11, (2, 5))
    p = probabilities(logits)
    expected = -np.mean([np.log(p[b, t, tokens[b, t + 1]]) for b in range(2) for t in range(4)])
    assert _next_token_loss(logits, tokens).item() == pytest.approx(expected, abs=TOLERANCE)


def test_distillation_loss_is_the_divergence_from_teacher_to_student() -> None:
    student, teacher = random_logits(1), random_logits(2)
    q, p = probabilities(student), probabilities(teacher)
    expected = (p * np.log(p / q)).sum(-1).mean()
    swapped = (q * np.log(q / p)).sum(-1).mean()
    loss = _distillation_loss(student, teacher).item()
    assert loss == pytest.approx(expected, abs=TOLERANCE)
    assert abs(loss - swapped) > 0.01  # the two directions differ, so the test tells them apart


def test_distillation_loss_is_zero_for_logits_that_differ_by_a_constant() -> None:
    logits = random_logits(3)
    assert _distillation_loss(logits + 5, logits).item() == pytest.approx(0, abs=TOLERANCE)


def test_losses_of_half_precision_logits_are_summed_in_float32() -> None:
    logits = random_logits(4).bfloat16()
    tokens = torch.randint(11, (2, 5))
    assert (
        _next_token_loss(logits, tokens).item() == _next_token_loss(logits.float(), tokens).item()
    )
    assert _distillation_loss(logits, random_logits(5)).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_workers_measure_the_bits_that_one_process_measures(family: str) -> None:
    model, teacher = tiny_model(family), tiny_model(family, seed=1)
    for other in (None, teacher):
        workers = Elsewhere()
        own = measured_losses(model, other, WINDOWS, 2, IN_PROCESS)
        assert measured_losses(model, other, WINDOWS, 2, workers) == own
        assert list(own) == ["next_token", "distillation"][: 1 + (other is not None)]
        assert len(workers.asked) == 3


def test_the_mean_does_not_depend_on_the_batch_size() -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    whole = measured_losses(model, teacher, WINDOWS, 5)
    for batch_size in (1, 3, 99):
        found = measured_losses(model, teacher, WINDOWS, batch_size)
        assert found == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}


def test_models_that_workers_cannot_make_are_measured_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, workers = tiny_model("llama"), Elsewhere()
    own = measured_losses(model, None, WINDOWS, 2)
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    monkeypatch.setattr(linear, "forward", lambda x: nn.Linear.forward(linear, x))
    assert measured_losses(model, None, WINDOWS, 2, workers) == own
    assert workers.asked == []
    assert "this process alone measures the losses" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_named() -> None:
    model = tiny_model("llama")
    nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    with pytest.raises(InputError, match="held-out windows is not finite") as caught:
        measured_losses(model, None, WINDOWS, 2)
    assert caught.value.details["where"] == "next_token"
