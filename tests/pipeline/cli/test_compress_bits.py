"""`skipcat compress` in few bits: budgets of bytes, formats, refusals, plans and interruptions."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from pipeline.artefact import sha256_of_file
from pipeline.calibrate.fisher import BackwardSweep
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from pipeline.compress import run as recipe
from pipeline.compress.embeddings import Embeddings
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.quantize.formats import RUNTIMES, Format
from tests.support.families import save_family
from tests.support.unproven import unproven

WEIGHTS = "model.safetensors"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tied model and a text."""
    folder = tmp_path_factory.mktemp("bits")
    save_family(folder / "model", "smollm", **SHAPE)
    text = random.Random(0).choices(string.ascii_letters + "     ", k=3000)
    (folder / "text.txt").write_text("".join(text))
    return folder


def compress(root: Path, output: Path, *arguments: str) -> int:
    """The command's exit status."""
    settings = ["--calibration", str(root / "text.txt"), "--windows", "24"]
    settings += ["--window-length", "32", "--effort", "fast"]
    return main(["compress", "-m", str(root / "model"), "-o", str(output), *settings, *arguments])


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    assert compress(root, root / "undisturbed", "--keep-bytes", "0.4") == 0
    return root / "undisturbed"


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def float16_bytes(root: Path) -> int:
    return 2 * sum(p.numel() for p in load_checkpoint(root / "model").parameters())


@pytest.mark.parametrize("share", [0.22, 0.3, 0.45, 0.7])
def test_the_weights_on_disk_use_the_budget_and_never_more(
    share: float, root: Path, tmp_path: Path
) -> None:
    arguments = ("--keep-bytes", str(share), "--runtime", "any")
    assert compress(root, tmp_path / "small", *arguments) == 0
    budget = share * float16_bytes(root)
    assert 0.95 * budget <= on_disk(tmp_path / "small") <= budget
    totals = read(tmp_path / "small", "report.json")["totals"]
    assert totals["stored_bytes"] == on_disk(tmp_path / "small")
    assert torch.isfinite(load_checkpoint(tmp_path / "small")(torch.arange(9)[None]).logits).all()


def test_a_budget_in_bytes_is_one_of_all_weights(root: Path, tmp_path: Path) -> None:
    assert compress(root, tmp_path / "small", "--memory", "60kB", "--runtime", "any") == 0
    assert 57_000 <= on_disk(tmp_path / "small") <= 60_000


@pytest.mark.parametrize("memory", [80_000, pytest.param(110_000, marks=pytest.mark.slow)])
def test_the_onnx_weights_of_the_cpu_use_the_budget_and_never_more(
    memory: int, root: Path, tmp_path: Path
) -> None:
    assert compress(root, tmp_path / "small", "--memory", str(memory)) == 0
    with unproven():
        record = export_folder(tmp_path / "small", tmp_path / "onnx", ExportRequest("cpu"))
    assert record["weights"] == "stored"
    assert record["data_bytes"] <= memory
    # Names count in the budget, and small tensors are inside the graph here.
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert sum(len(weight.raw_data) for weight in graph.initializer) > 0.8 * memory


@pytest.mark.parametrize(
    ("arguments", "context"), [(("--context", "200"), 200), (("--keep-cache", "0.4"), 0)]
)
def test_weights_maps_and_the_cache_of_a_context_use_one_budget_and_never_more(
    arguments: tuple[str, ...], context: int, root: Path, tmp_path: Path
) -> None:
    asked = ("--memory", "90kB", "--runtime", "any", *arguments)
    assert compress(root, tmp_path / "small", *asked) == 0
    cache = read(tmp_path / "small", "report.json")["cache"]
    assert cache["token_bytes"] < cache["dense_bytes"]
    used = on_disk(tmp_path / "small") + context * cache["token_bytes"]
    assert 84_000 <= used <= 90_000


def test_a_budget_too_small_for_any_plan_is_refused_with_one_that_works(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--memory", "5kB", "--runtime", "any")
    assert compress(root, tmp_path / "small", *arguments) == 2
    found = re.search(r"at least ([\d.]+) MB", capsys.readouterr().err)
    assert found
    assert not (tmp_path / "small").exists()
    assert compress(root, tmp_path / "small", "--memory", f"{found[1]}MB", "--runtime", "any") == 0
    assert on_disk(tmp_path / "small") <= float(found[1]) * 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1MB", "--keep-bytes", "0.5"], "at most one of them"),
        (["--keep-bytes", "1.5"], "--keep-bytes"),
        (["--memory", "much"], "no number of bytes"),
        (["--memory", "60MB", "--method", "skipcat"], "does not search ranks and bits"),
        (["--method", "rtn"], "needs a format"),
        (["--context", "100"], "share a budget only where both"),
        (
            ["--memory", "60MB", "--context", "100", "--plan", __file__],
            "share a budget only where both",
        ),
        (["--memory", "60MB", "--context", "100", "--keep-cache", "0.5"], "has one budget"),
        (["--memory", "60MB", "--context", "0"], "--context"),
        (["--weights", "int5-b32-asym"], "no such format"),
        (["--weights", "int3-b32-asym"], "--runtime any"),
        (["--table", "int4-b32-asym", "--runtime", "tensorrt"], "8 bits by row"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_cannot_be_meant_is_refused_before_the_model_is_looked_for(
    arguments: list[str],
    message: str,
    dry_run: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["compress", "-m", str(tmp_path / "none"), "-o", str(tmp_path / "small"), *arguments]
    assert main(asked + ["--dry-run"] * dry_run) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_the_runtime_has_no_blocks_for_is_refused_with_what_to_change(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = ("--weights", "int4-b64-sym", "--runtime", "tensorrt")
    arguments = ("--method", "skipcat", "--keep-params", "0.6", *formats)
    assert compress(root, tmp_path / "small", *arguments) == 2
    message = capsys.readouterr().err
    assert "whole blocks only" in message
    assert "--rank-multiple 64" in message
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_quantiser_keeps_every_matrix_whole_in_one_format(
    method: str, root: Path, tmp_path: Path
) -> None:
    formats = ("--weights", "int4-b32-asym", "--table", "int8-b64-sym")
    assert compress(root, tmp_path / "small", "--method", method, *formats) == 0
    report = read(tmp_path / "small", "report.json")
    assert {group["form"] for group in report["groups"]} == {"dense"}
    assert {group["up_style"] for group in report["groups"]} == {"int4-b32-asym"}
    assert set(report["tables"].values()) == {"int8-b64-sym"}
    assert all(0 < group["rounded_relative_error"] < 0.1 for group in report["groups"])
    assert report["totals"]["kept_fraction"] == 1


def test_feeding_errors_forward_leaves_less_of_them(root: Path, tmp_path: Path) -> None:
    lost = {}
    for method in ("rtn", "gptq"):
        formats = ("--weights", "int2-b32-asym", "--method", method)
        assert compress(root, tmp_path / method, *formats) == 0
        groups = read(tmp_path / method, "report.json")["groups"]
        lost[method] = sum(group["rounded_relative_error"] for group in groups)
    assert lost["gptq"] < 0.8 * lost["rtn"]


def test_factors_in_few_bits_report_what_truncation_and_rounding_left(
    root: Path, tmp_path: Path
) -> None:
    arguments = ("--keep-params", "0.7", "--weights", "int8-b32-sym")
    assert compress(root, tmp_path / "small", *arguments) == 0
    groups = read(tmp_path / "small", "report.json")["groups"]
    factored = [group for group in groups if group["form"] == "skip"]
    assert factored
    for group in factored:
        assert group["down_style"] == group["up_style"] == "int8-b32-sym"
        # The refit may win back more than 8 bits cost; of a group that loses next to nothing by
        # its rank, 8 bits alone take some 2e-5.
        assert group["rounded_relative_error"] == pytest.approx(
            group["relative_error"], rel=0.2, abs=5e-5
        )


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (BackwardSweep, "backward"),
        (FinishedLayers, "add"),
        (LayerCosts, "kept_choices"),
        (Embeddings, "quantize_"),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    owner: Any,
    name: str,
    root: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    whole: Callable[..., Any] = getattr(owner, name)
    last = 3 if name == "add" else 1

    def stop(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return whole(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        assert compress(root, tmp_path / "small", "--keep-bytes", "0.4") == 130
    assert compress(root, tmp_path / "small", "--keep-bytes", "0.4", "--resume") == 0
    assert sha256_of_file(tmp_path / "small" / WEIGHTS) == sha256_of_file(undisturbed / WEIGHTS)
    assert read(tmp_path / "small", "plan.json") == read(undisturbed, "plan.json")


def test_another_budget_is_not_taken_up_where_an_earlier_one_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_build_report", None)  # Fails behind the last layer.
        assert compress(root, tmp_path / "small", "--keep-bytes", "0.4") == 1
    assert compress(root, tmp_path / "small", "--keep-bytes", "0.5", "--resume") == 3
    assert "differs in keep_bytes" in capsys.readouterr().err


def test_a_written_plan_that_is_followed_gives_the_same_weights(
    root: Path, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = ("--plan", str(undisturbed / "plan.json"), "--dtype", "float16")
    assert compress(root, tmp_path / "small", *arguments) == 0
    assert read(tmp_path / "small", "plan.json") == read(undisturbed, "plan.json")
    assert sha256_of_file(tmp_path / "small" / WEIGHTS) == sha256_of_file(undisturbed / WEIGHTS)


def test_formats_that_are_edited_into_a_plan_are_followed(
    root: Path, undisturbed: Path, tmp_path: Path
) -> None:
    plan = read(undisturbed, "plan.json")
    edited = plan["layers"]["model.layers.0"]
    for group in edited:
        group["up_style"] = "int8-b16-sym"
        group["down_style"] = None if group["form"] == "dense" else "int4-b16-asym"
    plan["tables"] = dict.fromkeys(("model.embed_tokens", "lm_head"), "int6-b32-asym")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = ("--plan", str(tmp_path / "plan.json"), "--runtime", "any")
    assert compress(root, tmp_path / "small", *arguments) == 0
    modules = read(tmp_path / "small", "config.json")["quantization_config"]["modules"]
    assert modules["lm_head"]["up_style"] == "int6-b32-asym"
    stored = load_file(tmp_path / "small" / WEIGHTS)
    for group in edited:
        assert all(modules[member]["up_style"] == "int8-b16-sym" for member in group["members"])
        owner = group["members"][0]
        part = "" if group["form"] == "dense" else ".up"
        width = group["columns"] if group["form"] == "dense" else group["rank"]
        blocks = Format.parse("int8-b16-sym").blocks(width)
        assert stored[f"{owner}{part}.stored.scales"].shape[1] == blocks


def test_a_plan_with_a_format_that_does_not_exist_is_refused(
    root: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = read(undisturbed, "plan.json")
    plan["layers"]["model.layers.0"][0]["up_style"] = "int5-b16-sym"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert compress(root, tmp_path / "small", "--plan", str(tmp_path / "plan.json")) == 3
    assert "int5-b16-sym" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_dry_run_shows_the_formats_that_compressing_uses(
    root: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("--keep-bytes", "0.4", "--dry-run", "--json")
    assert compress(root, tmp_path / "small", *asked) == 0
    shown = json.loads(capfd.readouterr().out)["groups"]
    groups = [g for layer in read(undisturbed, "plan.json")["layers"].values() for g in layer]
    keys = ("form", "rank", "down_style", "up_style")
    assert [[g[k] for k in keys] for g in shown] == [[g[k] for k in keys] for g in groups]
    assert not (tmp_path / "small").exists()


def test_a_plan_holds_formats_of_its_runtime_alone(undisturbed: Path) -> None:
    plan = read(undisturbed, "plan.json")
    groups = [g for layer in plan["layers"].values() for g in layer]
    styles = {g[k] for g in groups for k in ("down_style", "up_style")} | {*plan["tables"].values()}
    runtime = RUNTIMES["cpu"]
    assert all(runtime.accepts(Format.parse(style)) for style in styles - {None})
    assert len(styles - {None}) > 1
