"""The classifiers of `test_trace_classifier`; other files have checkpoints of their own."""

from __future__ import annotations

from tests.support.compressed_classifiers import checkpoints, images, sources

__all__ = ["checkpoints", "images", "sources"]
