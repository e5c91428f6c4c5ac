"""Fixtures: image classifiers on disk that no test changes, and what is made of them.

A `conftest.py` imports those that its tests ask for.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from tests.support.classifiers import FAMILIES, save_classifier, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 random images."""
    return write_images(tmp_path_factory.mktemp("images") / "random.npz", 80)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of every family."""
    root = tmp_path_factory.mktemp("classifiers")
    return {family: save_classifier(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def checkpoints(
    sources: dict[str, Path], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Each of them compressed, every group in skip form."""
    root = tmp_path_factory.mktemp("compressed")
    for family, source in sources.items():
        request = CompressRequest(str(source), 0.7, method="skipcat", calibration=str(images))
        compress_to_folder(request, root / family)
    return {family: root / family for family in sources}
