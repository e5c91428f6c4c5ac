"""The scenes of `make driving` are what a training reads."""

from __future__ import annotations

from pathlib import Path

from pipeline.driving.data import open_data
from tools.draw_scenes import main


def test_both_domains_are_drawn_and_nothing_is_drawn_over(tmp_path: Path) -> None:
    given = ["-o", str(tmp_path / "scenes"), "--scenes", "4", "--validated", "2"]
    given += ["--size", "64", "96"]
    assert main(given) == 0
    for domain, count in {"wide": 4, "dense": 1}.items():
        for split, number in {"train": count, "val": 2}.items():
            data = open_data(str(tmp_path / "scenes" / domain), split, (64, 96))
            assert len(data) == number
            sample = data.read(0)
            assert sample.image.shape == (64, 96, 3)
            assert sample.drivable is not None
            assert sample.drivable.any()
    assert main(given) == 2
