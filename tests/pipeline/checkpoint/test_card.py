from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline.checkpoint.card import model_card

from pipeline.checkpoint.folder import read_recipe, read_report
from tests.support.tiny_recovery import save_small

RECOVERY = {
    "objective": "next_token",
    "settings": {"lora_rank": 8, "steps": 500, "batch_size": 4, "teacher": None},
    "text": {"window_length": 512, "source": "train.txt", "seed": 3},
    "held_out_windows": 22,
    "loss": {"next_token": {"before": 4.25, "after": 3.5}},
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    small: Path = save_small(tmp_path_factory.mktemp("card"))
    return read_recipe(small), read_report(small)


def test_without_a_recovery_the_card_says_that_nothing_was_fine_tuned(
    records: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    recipe, report = records
    assert "No fine-tuning took place." in model_card(recipe, report)


def test_after_a_recovery_the_card_says_how_and_what_it_won(
    records: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    recipe, report = records
    card = model_card(recipe | {"recovery": RECOVERY}, report)
    assert "No fine-tuning" not in card
    for fact in ("rank 8", "500 steps of 4 windows of 512 tokens from train.txt", "seed 3",
                 "22 windows held out", "4.2500 before and 3.5000 after", "cross entropy",
                 "when it was compressed"):  # fmt: skip
        assert fact in card


def test_the_card_of_a_distilled_checkpoint_names_the_teacher(
    records: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    recipe, report = records
    changes: dict[str, Any] = {
        "objective": "distillation",
        "settings": {**RECOVERY["settings"], "teacher": "big-model"},  # type: ignore[dict-item]
        "loss": {"distillation": {"before": 1.0, "after": 0.5}},
    }
    card = model_card(recipe | {"recovery": {**RECOVERY, **changes}}, report)
    assert "KL divergence from big-model" in card
