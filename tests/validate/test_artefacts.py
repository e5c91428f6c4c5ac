"""What lies in a build folder, and what is still to come there."""

from __future__ import annotations

import json
from pathlib import Path

from validate.artefacts import Artefacts


def test_an_engine_that_is_still_being_built_stands_among_those_that_are_there(
    tmp_path: Path,
) -> None:
    for name in ("checkpoint/config.json", "engine-a/manifest.json", "engine-c/manifest.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    record = {"request": {"compress": {"model": "the original"}}}
    (tmp_path / "build.json").write_text(json.dumps(record))
    engines = [tmp_path / f"engine-{letter}" for letter in "abc"]
    assert list(Artefacts.find(tmp_path, [engines[1]]).engines) == engines
    assert list(Artefacts.find(tmp_path).engines) == [engines[0], engines[2]]
