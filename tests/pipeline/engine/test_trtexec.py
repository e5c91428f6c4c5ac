"""The command for trtexec, run by a stand-in that reads its flags as trtexec's help describes them.

The stand-in builds with the fake TensorRT, and knows nothing of how the command was made.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.engine import target as targets
from pipeline.engine.plan import EngineRequest, plan_engine
from pipeline.engine.target import Target
from pipeline.engine.trtexec import trtexec_command
from pipeline.errors import UsageError
from pipeline.gpu import ORIN, Gpu
from tests.support.fake_gpu.board import FAKES, Board, board
from tests.support.tiny_graph import write_export

__all__ = ["board"]
STAND_IN = r"""
import re, sys
sys.path.insert(0, sys.argv.pop(1))
import tensorrt as trt

flags = [a[2:].partition("=")[::2] for a in sys.argv[2:]]
known = {"onnx", "stronglyTyped", "profilingVerbosity", "skipInference", "saveEngine", "profile",
         "timingCacheFile", "memPoolSize", "staticPlugins", "minShapes", "optShapes", "maxShapes"}
assert {name for name, _ in flags} <= known, flags
single = {name: value for name, value in flags}
builder = trt.Builder(trt.Logger())
typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
network = builder.create_network(typed * ("stronglyTyped" in single))
assert trt.OnnxParser(network, builder.logger).parse_from_file(single["onnx"])
config = builder.create_builder_config()
if "memPoolSize" in single:
    pool, size, unit = re.fullmatch(r"(\w+):(\d+)([KMG])", single["memPoolSize"]).groups()
    assert pool == "workspace"
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(size) << 20)
profiles, current = {}, None
for name, value in flags:
    if name == "profile":
        current = profiles.setdefault(int(value), {})
    elif name.endswith("Shapes"):
        for spec in value.split(","):
            tensor, dims = spec.rsplit(":", 1)
            current.setdefault(tensor, {})[name[:3]] = [int(d) for d in dims.split("x")]
for index in sorted(profiles):
    profile = builder.create_optimization_profile()
    for tensor, ends in profiles[index].items():
        profile.set_shape(tensor, ends["min"], ends["opt"], ends["max"])
    assert config.add_optimization_profile(profile) == index
with open(single["saveEngine"], "wb") as file:
    file.write(builder.build_serialized_network(network, config))
"""


@pytest.fixture
def orin(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_gpu", lambda: Gpu("Orin", ORIN))


def printed_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], str]:
    capsys.readouterr()
    assert main([*arguments, "--trtexec"]) == 0
    printed = capsys.readouterr()
    made, _, command = printed.out.strip().partition(" && ")
    assert made.startswith("mkdir -p ")
    return shlex.split(command), printed.err


def run_stand_in(command: list[str]) -> None:
    assert command[0] == "trtexec"
    subprocess.run([sys.executable, "-c", STAND_IN, str(FAKES), *command], check=True)


@pytest.mark.parametrize("more", [[], ["--workspace", "100", "--max-batch", "2"]])
def test_the_printed_command_builds_the_plan_that_we_build_and_it_is_adopted(
    more: list[str], orin: None, tiny_export: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engine = tmp_path / "an engine"
    arguments = ["engine", str(tiny_export), "-o", str(engine), "--target", "tensorrt", *more]
    command, said = printed_command(arguments, capsys)
    folder = tmp_path / "an engine-trtexec"
    assert str(folder / "engine.plan") in said
    assert not engine.exists()
    folder.mkdir()
    run_stand_in(command)
    assert main([*arguments, "--adopt", str(folder / "engine.plan")]) == 0
    adopted = json.loads((engine / "manifest.json").read_text())
    assert main([*arguments, "--overwrite"]) == 0
    built = json.loads((engine / "manifest.json").read_text())
    for name in ("plan", "profiles", "limits", "target", "engine_layers", "block_skip", "onnx"):
        assert adopted[name] == built[name], name


def test_a_plan_that_was_built_for_other_options_is_refused_with_exit_status_3(
    orin: None, tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    arguments = ["engine", str(tiny_export), "-o", str(engine), "--target", "tensorrt"]
    command, _ = printed_command(arguments, capsys)
    (tmp_path / "engine-trtexec").mkdir()
    run_stand_in(command)
    plan = str(tmp_path / "engine-trtexec" / "engine.plan")
    assert main([*arguments, "--max-batch", "2", "--adopt", plan]) == 3
    assert "other shapes" in capsys.readouterr().err
    assert not engine.exists()


@pytest.mark.parametrize(
    "more",
    [["--dry-run", "--trtexec"], ["--trtexec", "--embed-kernels"], ["--trtexec", "--adopt", "X"]],
)
def test_flags_that_exclude_each_other_exit_2(
    more: list[str], orin: None, tiny_export: Path, tmp_path: Path
) -> None:
    more = [str(tiny_export / "model.onnx") if word == "X" else word for word in more]
    folder = ["engine", str(tiny_export), "-o", str(tmp_path / "engine"), "--target", "tensorrt"]
    assert main([*folder, *more]) == 2


def test_what_trtexec_cannot_be_given_as_it_is_is_refused(
    board: Board, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "plugin.so"
    library.write_text("plugins: BlockSkipLinear")
    request = EngineRequest(Target("tensorrt", ORIN, "a test"), plugin=library)
    plan = plan_engine(tiny_export, request)
    command = trtexec_command(plan, tmp_path)
    assert f"--staticPlugins={library}" in command
    assert "--preview=+aliasedPluginIO1003" not in command
    static = write_export(tmp_path / "static", profile="compat-static")
    command = trtexec_command(plan_engine(static, request), tmp_path)
    assert "--preview=+aliasedPluginIO1003" in command
    with pytest.raises(UsageError, match="rewritten to grow"):
        trtexec_command(plan_engine(static, replace(request, plugin=None)), tmp_path)
    import tensorrt  # type: ignore[import-not-found]

    monkeypatch.setattr(tensorrt, "__version__", "10.3.0")
    with pytest.raises(UsageError, match="function bodies"):
        trtexec_command(plan, tmp_path)
