from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.engine import plugin_library
from pipeline.engine.plugin_library import (
    _block_skip_creators,
    _PluginCreator,
    _require_plugin_file,
    choose_plugin,
    load_plugin,
)
from pipeline.errors import InputError

OURS = _PluginCreator("BlockSkipLinear", "1", "skipcat")


def test_only_the_name_version_and_namespace_of_the_nodes_count() -> None:
    others = [
        _PluginCreator("BlockSkipLinear", "1", ""),
        _PluginCreator("BlockSkipLinear", "2", "skipcat"),
        _PluginCreator("NMS", "1", "skipcat"),
    ]
    assert _block_skip_creators([*others, OURS]) == [OURS]


def test_a_missing_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        _require_plugin_file(tmp_path / "absent.so")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    path = tmp_path / "empty.so"
    path.write_bytes(b"not a library")
    with pytest.raises(InputError, match="cannot load"):
        load_plugin(trt, path)


def test_the_plugin_that_was_built_is_taken_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, named = tmp_path / "built.so", tmp_path / "named.so"
    monkeypatch.setattr(plugin_library, "BUILT_PLUGIN", built)
    path, said = choose_plugin(None)
    assert path is None
    assert "make plugin" in said
    assert "function body" in said
    built.write_bytes(b"")
    assert choose_plugin(None)[0] == built
    named.write_bytes(b"")
    assert choose_plugin(named)[0] == named
