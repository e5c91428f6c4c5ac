"""A model of several layers, in two types, and an export of it in few bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.layered_model import shared_layers


@pytest.fixture(scope="session")
def model() -> Path:
    return shared_layers()
