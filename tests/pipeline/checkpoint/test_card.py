from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.card import model_card
from pipeline.checkpoint.folder import read_record
from tests.support.tiny_recovery import save_small


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    small: Path = save_small(tmp_path_factory.mktemp("card"))
    return read_record(small, "recipe.json"), read_record(small, "report.json")


def test_without_a_recovery_the_card_says_that_nothing_was_fine_tuned(
    records: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    recipe, report = records
    assert "No fine-tuning took place." in model_card(recipe, report)


def test_the_card_takes_in_what_is_said_of_a_fine_tuning(
    records: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    recipe, report = records
    card = model_card(recipe, report, "The factors were trained for a week.")
    assert "No fine-tuning" not in card
    for fact in ("trained for a week", "when it was compressed", recipe["method"]["summary"]):
        assert fact in card
