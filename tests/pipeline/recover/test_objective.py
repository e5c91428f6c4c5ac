"""The losses against their definitions, written out in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.recover.objective import distillation_loss, next_token_loss

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
    assert next_token_loss(logits, tokens).item() == pytest.approx(expected, abs=TOLERANCE)


def test_distillation_loss_is_the_divergence_from_teacher_to_student() -> None:
    student, teacher = random_logits(1), random_logits(2)
    q, p = probabilities(student), probabilities(teacher)
    expected = (p * np.log(p / q)).sum(-1).mean()
    swapped = (q * np.log(q / p)).sum(-1).mean()
    loss = distillation_loss(student, teacher).item()
    assert loss == pytest.approx(expected, abs=TOLERANCE)
    assert abs(loss - swapped) > 0.01  # the two directions differ, so the test tells them apart


def test_distillation_loss_is_zero_for_logits_that_differ_by_a_constant() -> None:
    logits = random_logits(3)
    assert distillation_loss(logits + 5, logits).item() == pytest.approx(0, abs=TOLERANCE)


def test_losses_of_half_precision_logits_are_summed_in_float32() -> None:
    logits = random_logits(4).bfloat16()
    tokens = torch.randint(11, (2, 5))
    assert next_token_loss(logits, tokens).item() == next_token_loss(logits.float(), tokens).item()
    assert distillation_loss(logits, random_logits(5)).dtype == torch.float32
