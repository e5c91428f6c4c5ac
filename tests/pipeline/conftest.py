"""Image classifiers on disk that no test changes, and what is made of them."""

from __future__ import annotations

from tests.support.compressed_classifiers import checkpoints, images, sources

__all__ = ["checkpoints", "images", "sources"]
