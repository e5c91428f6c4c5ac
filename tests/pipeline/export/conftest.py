"""Classifiers for `test_trace_classifier`, exported folders for `test_onnx_folder`."""

from __future__ import annotations

from tests.support.compressed_classifiers import checkpoints, images, sources
from tests.support.tiny_graph import export_writer, tiny_export

__all__ = ["checkpoints", "export_writer", "images", "sources", "tiny_export"]
