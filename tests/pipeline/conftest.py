"""Image classifiers on disk that no test changes, and what is made of them."""

from __future__ import annotations

import pytest

from benchmarks.digits import Digits, make_digits
from tests.support.compressed_classifiers import checkpoints, images, sources

__all__ = ["checkpoints", "digits", "images", "sources"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """A ViT trained on scikit-learn's digits."""
    return make_digits(tmp_path_factory.mktemp("digits"))
