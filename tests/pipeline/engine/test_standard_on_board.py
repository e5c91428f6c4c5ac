"""`standard.build` executed, in this process, with the fake TensorRT."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import network, standard
from pipeline.engine.plan import EngineRequest, plan_engine
from pipeline.engine.target import Target
from pipeline.gpu import ORIN
from tests.support.fake_gpu.board import Board, board

__all__ = ["board"]


def test_the_builder_is_gone_before_the_plan_is_read_back(
    board: Board, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt  # type: ignore[import-not-found]

    made: list[weakref.ref[Any]] = []
    begin, read = tensorrt.Builder.__init__, network._read_engine_layers

    def begin_and_note(self: Any, logger: Any) -> None:
        begin(self, logger)
        made.append(weakref.ref(self))

    def look_and_read(library: Any, plan_path: Path) -> dict[str, Any]:
        gc.collect()
        assert [ref() for ref in made] == [None]
        return read(library, plan_path)

    monkeypatch.setattr(tensorrt.Builder, "__init__", begin_and_note)
    monkeypatch.setattr(network, "_read_engine_layers", look_and_read)
    plan = plan_engine(tiny_export, EngineRequest(Target("tensorrt", ORIN, "a test")))
    result = standard.build(plan.work, tmp_path)
    assert result.engine_layers["readable"]
    assert result.block_skip == {"path": "function body", "nodes": 2}
