"""Image classifiers on disk that no test changes."""

from __future__ import annotations

from tests.support.compressed_classifiers import images, sources

__all__ = ["images", "sources"]
