from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_decoder import shared_export


@pytest.fixture(scope="session")
def exports() -> dict[str, Path]:
    """The same tiny model in both profiles."""
    return {profile: shared_export(profile) for profile in ("opset24", "compat")}
