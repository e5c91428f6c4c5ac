"""Exported folders for the tests of the engine stage."""

from __future__ import annotations

from tests.support.tiny_graph import export_writer, tiny_export

__all__ = ["export_writer", "tiny_export"]
