"""Exports without the proof by a twin, for tests that hold the graph against torch themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def unproven() -> Iterator[None]:
    """Inside, an export is as where ONNX Runtime is missing: written, and said to be unproven.

    The proof depends on a model's config, the profile and the type, and takes as long as the export
    itself. It says nothing of codes, formats and plans, nor of what is made of the folder: where
    these are tested it may be left to the tests of the proof (test_prove.py) and of the families
    (test_export.py, test_attention.py), if the graph's numbers are compared with torch's, or only
    its form is looked at.
    """

    def missing(*arguments: Any) -> dict[str, str]:
        return {"missing": "a test looks at the graph itself"}

    with patch("pipeline.export.export.prove", missing):
        yield
