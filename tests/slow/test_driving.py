"""The driving network learns: a small one, on small scenes, in a minute or two of one core."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.driving.recipe import TrainRequest
from pipeline.driving.train import train_to_folder

pytestmark = pytest.mark.slow


def test_a_short_training_finds_the_road_in_scenes_that_it_has_not_seen(tmp_path: Path) -> None:
    request = TrainRequest(
        data="scenes:wide:120", second_data="scenes:dense:60", steps=160, size=(96, 160), width=8,
        scored=24,
    )  # fmt: skip
    stages = train_to_folder(request, tmp_path / "net")["stages"]
    first, last = (stages[place]["scores"] for place in (0, -1))
    for name in ("first", "second"):
        # No drivable pixel at all is 0.36; 0.66 and 0.71 were reached where this was written.
        road = "drivable_miou"
        assert last[name]["scores"][road] > max(0.5, first[name]["scores"][road] + 0.1)
        # Vehicles take longer: after so few steps a score of 24 images says that some are found.
        assert last[name]["scores"]["ap50"] > 0.005
