"""The fake board for the tests of the device runtime."""

from __future__ import annotations

from tests.support.fake_gpu.board import board

__all__ = ["board"]
