"""A build makes every stage, keeps what it finished, and says what is wrong before it starts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import build
from pipeline.artefact import sha256_of_file
from pipeline.cli.main import main
from pipeline.compress.request import CompressRequest
from pipeline.engine import target
from pipeline.errors import InputError
from pipeline.folder_lock import LOCK_FILE, FolderLock
from pipeline.gpu import ORIN, Gpu
from tests.support.ledger_stages import perturb_onnx
from tests.support.tiny_build import build_arguments
from tests.support.tiny_decoder import byte_tokenizer

STAGES = ["compress", "export float32", "validate"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A build of a tiny model for the CPU, but for its output."""
    return build_arguments(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def printed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished build, not to be written to, and what it printed on stdout."""
    folder = tmp_path_factory.mktemp("build") / "tiny"
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert main([*arguments, "-o", str(folder)]) == 0
    return folder, stdout.getvalue()


@pytest.fixture
def built(printed: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished build."""
    return shutil.copytree(printed[0], tmp_path / "tiny")


def must_not_run(*args: Any, **kwargs: Any) -> None:
    pytest.fail("a stage was run")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stages_of(folder: Path) -> list[str]:
    return list(json.loads((folder / "build.json").read_text())["stages"])


@pytest.mark.slow
def test_the_lock_of_a_run_that_was_killed_after_its_last_stage_is_not_kept(
    arguments: list[str], built: Path
) -> None:
    for stage in ("ledger", "onnx", "checkpoint"):
        (built / stage / LOCK_FILE).write_text("1")
    assert main([*arguments, "-o", str(built), "--resume"]) == 0
    assert not list(built.rglob(LOCK_FILE))


def test_a_build_makes_every_stage_and_prints_a_table(printed: tuple[Path, str]) -> None:
    folder, text = printed
    assert names_in(folder) == {"build.json", "checkpoint", "onnx", "ledger"}
    assert stages_of(folder) == STAGES
    for word in (*STAGES, "parameters kept", "onnxruntime", "pass"):
        assert word in text
    # Whole paths on one line, so that they can be copied.
    assert f"report: {folder / 'ledger' / 'ledger.html'}\n" in text
    assert f"skipcat run {folder / 'onnx'} -p" in text
    ledger = json.loads((folder / "ledger" / "ledger.json").read_text())
    assert ledger["passed"]
    statuses = [row["verdict"]["status"] for row in ledger["rows"]]
    assert statuses == ["measured", "measured", "pass", "pass"]


def test_nothing_but_the_builds_own_record_says_where_on_this_machine_it_was_made(
    built: Path, printed: tuple[Path, str], arguments: list[str]
) -> None:
    (built / "onnx" / "model.onnx.data").unlink()  # a stage's reason names its files
    few = ["--windows", "2", "--window-length", "32", "--prompts", "1", "--max-new-tokens", "4"]
    assert main(["validate", str(built), "-o", str(built / "broken"), *few]) == 5
    folders = (printed[0].parent, built.parent, Path(arguments[2]).parent, Path.home(), Path.cwd())
    files = [path for path in built.rglob("*") if path.is_file() and path.name != "build.json"]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        assert [str(f) for f in folders if str(f).encode() in content] == [], path


def test_a_finished_build_is_printed_as_json_without_any_work(
    built: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for stage in ("compress_to_folder", "export_folder"):
        monkeypatch.setattr(build, stage, must_not_run)
    assert main([*arguments, "-o", str(built), "--resume", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert list(record["stages"]) == STAGES
    assert record["ledger"] == json.loads((built / "ledger" / "ledger.json").read_text())


def test_ctrl_c_keeps_finished_stages_and_resume_does_the_rest(
    arguments: list[str],
    printed: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "tiny"
    command = [*arguments, "-o", str(output)]

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "export_folder", interrupt)
        assert main(command) == 130
    assert "--resume" in capsys.readouterr().err
    assert names_in(output) == {"build.json", "checkpoint"}
    assert stages_of(output) == ["compress"]

    weights = output / "checkpoint" / "model.safetensors"
    before = weights.stat().st_mtime_ns, sha256_of_file(weights)
    monkeypatch.setattr(build, "compress_to_folder", must_not_run)
    assert main([*command, "--resume"]) == 0
    assert (weights.stat().st_mtime_ns, sha256_of_file(weights)) == before
    assert names_in(output) == names_in(printed[0])
    assert stages_of(output) == STAGES
    for name in ("checkpoint/model.safetensors", "onnx/model.onnx", "onnx/model.onnx.data"):
        assert sha256_of_file(output / name) == sha256_of_file(printed[0] / name)


def test_a_wrong_export_fails_the_build_with_5_after_reporting(
    built: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    perturb_onnx(built / "onnx")
    record = json.loads((built / "onnx" / "export.json").read_text())
    weights = built / "onnx" / "model.onnx.data"
    record["onnx_sha256"] = sha256_of_file(built / "onnx" / "model.onnx")
    record |= {"data_sha256": sha256_of_file(weights), "data_bytes": weights.stat().st_size}
    (built / "onnx" / "export.json").write_text(json.dumps(record))
    shutil.rmtree(built / "ledger")
    assert main([*arguments, "-o", str(built), "--resume"]) == 5
    captured = capsys.readouterr()
    assert "fail" in captured.out
    assert "onnxruntime onnx" in captured.err
    ledger = json.loads((built / "ledger" / "ledger.json").read_text())
    assert [row["verdict"]["status"] for row in ledger["rows"]][2:] == ["pass", "fail"]
    assert (built / "ledger" / "ledger.html").is_file()


def test_an_existing_output_is_refused_and_overwrite_replaces_all_of_it(
    built: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (built / "stale.txt").write_text("of an earlier run")
    monkeypatch.setattr(build, "compress_to_folder", lambda request, path, **_: path.mkdir())
    monkeypatch.setattr(build, "export_folder", must_not_run)
    before = names_in(built)
    assert main([*arguments, "-o", str(built)]) == 2
    assert "OVERWRITE=1" in capsys.readouterr().err
    assert names_in(built) == before
    with pytest.raises(pytest.fail.Exception):
        main([*arguments, "-o", str(built), "--overwrite"])
    assert names_in(built) == {"build.json", "checkpoint"}
    assert names_in(built / "checkpoint") == set()


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
@pytest.mark.parametrize("content", [None, "{", "[]", '{"status": "ok"}'])
def test_a_folder_of_something_else_is_left_as_it_is(
    flag: str,
    content: str | None,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if content is not None:
        (tmp_path / "build.json").write_text(content)
    before = names_in(tmp_path)
    assert main([*arguments, "-o", str(tmp_path), flag]) == 3
    assert str(tmp_path) in capsys.readouterr().err
    assert names_in(tmp_path) == before


def test_resuming_with_other_settings_is_refused(
    built: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (built / "build.json").read_bytes()
    assert main([*arguments, "-o", str(built), "--resume", "--seed", "1"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert (built / "build.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "name", "told"), [("-m", "model.safetensors", "model"), ("--eval-text", "", "files")]
)
def test_stages_of_other_inputs_under_the_same_name_are_not_kept(
    flag: str,
    name: str,
    told: str,
    built: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "compress_to_folder", must_not_run)
    path = Path(arguments[arguments.index(flag) + 1]) / name
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        assert main([*arguments, "-o", str(built), "--resume"]) == 2
    finally:
        path.write_bytes(before)
    assert f"differs in {told}" in capsys.readouterr().err
    assert stages_of(built) == STAGES


def test_nothing_that_is_published_names_a_folder_of_this_machine(
    built: Path, arguments: list[str]
) -> None:
    own = Path(arguments[arguments.index("-m") + 1]).parent
    for path in built.rglob("*"):
        # build.json stays: it is what --resume and validate find model and texts by.
        if path.is_file() and path.name != "build.json":
            assert str(own).encode() not in path.read_bytes(), path
    recipe = json.loads((built / "checkpoint" / "recipe.json").read_text())
    assert recipe["model"] == recipe["settings"]["model"] == "tiny"
    assert recipe["model_files"]["model.safetensors"] == sha256_of_file(
        own / "tiny" / "model.safetensors"
    )


def test_files_are_readable_by_whom_the_umask_lets(built: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in built.rglob("*") if path.is_file()}
    mask = os.umask(0o022)
    os.umask(mask)
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_one_build_at_a_time(
    built: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = names_in(built)
    with FolderLock(built):
        for flag in ("--resume", "--overwrite"):
            assert main([*arguments, "-o", str(built), flag]) == 2
            assert f"process {os.getpid()}" in capsys.readouterr().err
    assert names_in(built) == before


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        (["--keep-params", "1.5"], 2, "--keep-params"),
        (["--max-length", "1"], 2, "--max-length"),
        (["--max-length", "95"], 2, "at least 96"),  # a prompt of 32 and its answer of 64
        (["--eval-length", "31"], 2, "at least 32"),
        (["--eval-windows", "7"], 2, "at most 7"),  # prompts of 32 tokens; 8 are decoded
        (["--max-length", "512", "--eval-length", "257"], 2, "at most 256"),
        (["--window-length", "257"], 2, "at most 256"),
        (["--eval-windows", "100"], 3, "too short"),
        (["--eval-text", "/nowhere.txt"], 3, "cannot be read"),
        (["--windows", "100"], 3, "too short"),
        (["--target", "sm87"], 3, "Jetson Orin"),
        (["--target", "nothing"], 2, "not a target"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_any_work(
    changed: list[str],
    status: int,
    message: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "compress_to_folder", must_not_run)
    monkeypatch.setattr(target, "_look", lambda: target._Host(None, False))
    assert main([*arguments, "-o", str(tmp_path / "tiny"), *changed]) == status
    assert message in capsys.readouterr().err
    assert names_in(tmp_path) == set()


def test_a_text_is_asked_for_as_many_windows_as_a_narrow_model_is_calibrated_on(
    arguments: list[str], tmp_path: Path
) -> None:
    request = CompressRequest(
        model=arguments[2], calibration=str(tmp_path / "text.txt"), effort="fast", window_length=256
    )
    effort = request.resolved_effort
    config = AutoConfig.from_pretrained(arguments[2])
    widest = max(config.hidden_size, config.intermediate_size)
    needed = effort.windows_for(widest) * 256  # by bytes: a token each
    assert needed < effort.windows * 256
    (tmp_path / "text.txt").write_text("a" * needed)
    build.require_inputs(request)
    (tmp_path / "text.txt").write_text("a" * (needed - 1))
    with pytest.raises(InputError, match="too short") as error:
        build.require_inputs(request)
    assert f"at least {needed} tokens" in str(error.value)


def test_a_model_that_cannot_be_exported_is_refused_before_it_is_compressed(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = AutoConfig.for_model(
        "gptj", vocab_size=272, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=128
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gptj")
    byte_tokenizer().save_pretrained(tmp_path / "gptj")
    monkeypatch.setattr(build, "compress_to_folder", must_not_run)
    flags = ["-m", str(tmp_path / "gptj"), "-o", str(tmp_path / "built")]
    assert main([*arguments, *flags]) == 3
    assert "attention interface" in capsys.readouterr().err
    assert names_in(tmp_path) == {"gptj"}


@pytest.mark.parametrize(
    ("version", "profile"),
    [
        ("10.3.0", "compat-static"),
        ("10.14.1", "compat-static"),
        ("10.16.1.11", "opset24"),
        ("11.4.0", "opset24"),
    ],
)
def test_the_tensorrt_that_is_here_decides_the_engines_graph(
    version: str, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    wanted = build.BuildRequest(CompressRequest("tiny"))
    exports = build._exports_of(wanted, target.Target("tensorrt", ORIN, "a test"))
    assert exports["onnx-fp16"].profile == profile
    assert exports["onnx"].profile == "opset24"


def test_a_tensorrt_that_knows_no_graph_is_refused_before_anything_is_compressed(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.__version__ = "8.6.2"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(build, "compress_to_folder", must_not_run)
    monkeypatch.setattr(target, "_look", lambda: target._Host(Gpu("Orin", ORIN), True))
    flags = ["--target", "tensorrt", "-o", str(tmp_path / "built")]
    assert main([*arguments, *flags]) == 3
    refused = capsys.readouterr().err
    assert "TensorRT 8.6.2" in refused
    assert "update TensorRT" in refused
    assert names_in(tmp_path) == set()


def test_a_refused_input_leaves_an_earlier_build_in_place(
    built: Path, arguments: list[str]
) -> None:
    before = names_in(built)
    changed = ["-o", str(built), "--overwrite", "--eval-text", "/nowhere.txt"]
    assert main([*arguments, *changed]) == 3
    assert names_in(built) == before
