from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.targets import traffic_of_folder
from pipeline.cli.main import main
from tests.support.tiny_decoder import save_tiny_folder, shared_export

QUICK = ["--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("bench") / "torch")


def test_torch_and_onnx_are_measured_side_by_side(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--json": tmp_path / "bench.json", "--plot": tmp_path / "roofline.svg"}
    places = [str(part) for pair in files.items() for part in pair]
    folders = [str(checkpoint), str(shared_export("opset24"))]
    assert main(["bench", *folders, *QUICK, *places, "-v"]) == 0
    captured = capsys.readouterr()
    record = json.loads(files["--json"].read_text())
    assert record["kind"] == "measurement"
    sessions = [row["session"] for row in record["rows"]]
    assert sessions == ["torch float32", "onnxruntime opset24 float32"]
    # Names alone: the record may be published.
    assert [row["folder"] for row in record["rows"]] == [Path(f).name for f in folders]
    assert str(checkpoint.parent) not in files["--json"].read_text()
    for row in record["rows"]:
        assert row["session"].split()[0] in captured.out
        assert row["session"] in files["--plot"].read_text()
    assert "measured on" in captured.out
    assert captured.err.count("round 2") == 3
    assert "round 2" not in captured.out
    assert_figures_agree(record, folders)


def assert_figures_agree(record: dict[str, Any], folders: list[str]) -> None:
    memory = record["bandwidth"]["bytes_per_s"]
    assert len(memory["all"]) == 2
    assert 0 < memory["min"] <= memory["median"] <= memory["max"]
    for row, folder in zip(record["rows"], folders, strict=True):
        traffic = traffic_of_folder(Path(folder))
        # Over the four steps the cache holds 9, 10, 11 and 12 tokens.
        read = traffic.weight_bytes() + traffic.cache_bytes(10.5)
        assert row["bytes_per_token"] == pytest.approx(read, abs=1)
        rate = row["decode_tokens_per_s"]
        assert len(rate["all"]) == len(row["prefill_tokens_per_s"]["all"]) == 2
        assert row["bytes_per_s"] == pytest.approx(row["bytes_per_token"] * rate["median"])
        assert row["bandwidth_share"] == pytest.approx(row["bytes_per_s"] / memory["median"])
        assert row["peak_bytes"] > 20e6
        assert row["peak_device_bytes"] is None


@pytest.mark.slow
def test_a_shape_without_weights_is_measured_dense_and_factored(tmp_path: Path) -> None:
    result = tmp_path / "bench.json"
    shape = ["--shape", "smollm2-135m", "--keep-params", "1,0.5", "--dtype", "bfloat16"]
    quick = ["--prompt-tokens", "2", "--new-tokens", "1", "--rounds", "1"]
    assert main(["bench", *shape, *quick, "--json", str(result)]) == 0
    dense, kept = json.loads(result.read_text())["rows"]
    assert dense["weight_bytes_per_token"] == 2 * 134_515_008
    # Half of the decoder's matrices are left, and all of the head.
    assert kept["weight_bytes_per_token"] / dense["weight_bytes_per_token"] < 0.61
    assert dense["session"] == kept["session"] == "torch bfloat16"


def test_a_prediction_says_so_and_carries_what_it_was_checked_against(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, plot = tmp_path / "bench.json", tmp_path / "roofline.svg"
    shape = ["--shape", "llama-3.1-70b", "--keep-params", "1,0.6", "--dtype", "int4"]
    arguments = [str(checkpoint), *shape, "--predict", "orin-nano-8gb,rtx-4090"]
    # 70 billion parameters fit neither: what was found is written, and refused.
    assert main(["bench", *arguments, "--json", str(result), "--plot", str(plot)]) == 4
    captured = capsys.readouterr()
    assert "does not run on these devices" in captured.err
    assert "PREDICTED, not measured" in captured.out
    assert "PREDICTED, not measured" in plot.read_text()
    assert "loading" not in captured.err
    record = json.loads(result.read_text())
    assert (record["kind"], record["measured"]) == ("prediction", False)
    assert len(record["rows"]) == 3 * 2 * 3
    assert not any("decode_tokens_per_s" in row for row in record["rows"])
    assert {row["device"] for row in record["check"]["published"]} >= {"orin-nano-8gb", "thor"}
    published = {(row["device"], row["engine"]): row["published_figures"] for row in record["rows"]}
    assert published["rtx-4090", "Edge-LLM"] == "none"
    assert "off" in published["orin-nano-8gb", "Edge-LLM"]
    assert "nothing was fitted to" in captured.err
    assert "does not fit" in captured.out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    status = main(["bench", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert "loading" not in captured.err  # nothing was started
    return status, captured.err


def test_a_bad_folder_is_refused_before_a_good_one_is_measured(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bad in (tmp_path, tmp_path / "none"):
        status, message = refused([str(checkpoint), str(bad), *QUICK], capsys)
        assert status == 3
        assert str(bad) in message


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "nothing to measure"),
        (["--shape", "gpt-5"], "llama-3.2-1b"),
        (["--shape", "qwen3-0.6b", "--predict", "tpu"], "rtx-4090"),
        (["--shape", "qwen3-0.6b", "--keep-params", "half"], "half"),
        (["--shape", "qwen3-0.6b", "--keep-params", "1.5"], "out of range"),
        (["--shape", "qwen3-0.6b", "--dtype", "int4"], "--predict"),
        (["--shape", "qwen3-0.6b", "--context", "5"], "--context"),
        (["--shape", "qwen3-0.6b", "--prompt-tokens", "50000"], "40960"),
        (["--shape", "qwen3-0.6b", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
    ],
)
def test_arguments_that_make_no_sense_exit_2(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, message = refused(arguments, capsys)
    assert status == 2
    assert word in message
