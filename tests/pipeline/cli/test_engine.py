"""`skipcat engine`, as the shell calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli.engine import _cache_rows
from pipeline.cli.main import main
from tests.support.tiny_graph import write_export

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")


@pytest.fixture(scope="module")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An opset24 float16 folder that no test changes."""
    return write_export(tmp_path_factory.mktemp("exports") / "tiny")


def test_json_on_stdout_is_the_manifest_and_choices_go_to_stderr(
    tiny_export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "engine"
    status = main(["engine", str(tiny_export), "-o", str(output), "--target", "sm86", "--json"])
    printed = capfd.readouterr()
    assert status == 0
    assert json.loads(printed.out) == json.loads((output / "manifest.json").read_text())
    assert "target rtx:sm86" in printed.err
    assert "lowered from 1024 to 16" in printed.err


def test_the_table_states_plan_size_and_block_skip_path(
    tiny_export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(["engine", str(tiny_export), "-o", str(tmp_path / "engine"), "--target", "8.9"])
    printed = capfd.readouterr().out
    assert status == 0
    assert "function body, 2 nodes" in printed
    assert "sm89" in printed


def test_without_a_plugin_a_static_cache_grows_and_that_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_export(tmp_path / "onnx", profile="compat-static")
    output = tmp_path / "engine"
    assert main(["engine", str(source), "-o", str(output), "--target", "sm86", "--json"]) == 0
    manifest = json.loads(capfd.readouterr().out)
    assert manifest["onnx"]["profile"] == "compat"
    assert "cache_write" not in manifest
    assert [note for note in manifest["notes"] if note.startswith("the cache grows")]
    shapes = manifest["profiles"][0]["shapes"]["past_key_values.0.key"]
    assert shapes["min"][2] == 0
    assert manifest["layer_types"].get("CONCATENATION", 0) >= 2


def test_the_table_says_who_writes_the_cache() -> None:
    assert _cache_rows({"nodes": 4, "path": "plugin"}) == [
        ("cache", "written in place by the plugin")
    ]
    assert _cache_rows(None) == []


def test_dry_run_shows_the_profiles_and_writes_nothing(
    tiny_export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["engine", str(tiny_export), "-o", str(tmp_path / "engine"), "--target", "sm86"]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert [profile["name"] for profile in plan["profiles"]] == ["decode", "prefill"]
    assert plan["block_skip_nodes"] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--target", "nothing"], 2),
        (["--target", "cpu"], 2),
        (["--target", "sm90"], 3),
        (["--target", "sm86", "--plugin", "absent.so"], 3),
        (["--target", "sm86", "--embed-kernels"], 3),
        (["--target", "sm86", "--max-batch", "0"], 2),
        (["--target", "sm86", "--trtexec"], 2),
        (["--target", "sm86", "--adopt", __file__], 2),
    ],
)
def test_what_cannot_be_built_has_its_exit_status(
    tiny_export: Path, tmp_path: Path, arguments: list[str], status: int
) -> None:
    folder = [str(tiny_export), "-o", str(tmp_path / "engine")]
    assert main(["engine", *folder, *arguments]) == status
    assert list(tmp_path.iterdir()) == []
