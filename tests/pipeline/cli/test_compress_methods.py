"""`skipcat compress` by every method: budgets, efforts, plans and interrupted surveys."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from pipeline.artefact import sha256_of_file
from pipeline.calibrate.fisher import BackwardSweep
from pipeline.checkpoint.dense import densify_
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from pipeline.compress import run as recipe
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.methods import DEFAULT_EFFORT, DEFAULT_METHOD, EFFORTS, METHODS
from pipeline.model import load
from pipeline.output import partial_path
from tests.support.families import save_family, tiny_model
from tests.support.tiny_decoder import byte_tokenizer

SETTINGS = ["--windows", "4", "--window-length", "32"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(tmp_path_factory.mktemp("original") / "tiny", "llama"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "small"


@pytest.fixture
def compress(original: str, output: Path) -> Callable[..., int]:
    """The command's exit status, for the tiny model and few windows unless said otherwise."""

    def run(*arguments: str) -> int:
        return main(["compress", "-m", original, "-o", str(output), *SETTINGS, *arguments])

    return run


@pytest.fixture(scope="module")
def undisturbed(original: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "small"
    assert main(["compress", "-m", original, "-o", str(folder), *SETTINGS]) == 0
    return folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


# Quantisers keep every matrix whole (test_compress_bits.py), as does what changes the cache alone;
# what rounds convolutions takes no linear layers.
@pytest.mark.parametrize(
    "method",
    [n for n, m in METHODS.items() if not (m.quantizer or m.cache_alone or m.convolutions)],
)
def test_every_method_writes_a_checkpoint_within_its_budget_that_loads(
    method: str, compress: Callable[..., int], output: Path
) -> None:
    assert compress("--method", method, "--keep-params", "0.6") == 0
    totals = read(output, "report.json")["totals"]
    assert 0.5 < totals["kept_fraction"] <= 0.6
    assert totals["total_after"] < totals["total_before"]
    written = read(output, "recipe.json")
    assert written["settings"]["method"] == method
    assert written["method"]["summary"] == METHODS[method].summary
    model = load_checkpoint(output)
    assert sum(p.numel() for p in model.parameters()) == totals["total_after"]


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_recipe_records_method_and_effort(
    effort: str, compress: Callable[..., int], output: Path
) -> None:
    assert compress("--effort", effort) == 0
    written = read(output, "recipe.json")
    assert written["settings"]["effort"] == effort
    assert written["settings"]["method"] == DEFAULT_METHOD
    assert written["effort"]["windows"] == written["effort"]["survey_windows"] == 4
    assert written["method"]["fit"]["mix"] == written["effort"]["mix"] == EFFORTS[effort].mix


def test_a_plan_is_drawn_and_written_with_what_it_is_expected_to_cost(undisturbed: Path) -> None:
    root = ElementTree.parse(undisturbed / "plan.svg").getroot()
    assert root.tag.endswith("svg")
    groups = [g for layer in read(undisturbed, "plan.json")["layers"].values() for g in layer]
    assert all(group["expected_kl"] is not None for group in groups)
    assert any(group["expected_kl"] > 0 for group in groups)


def test_the_same_command_draws_the_same_plan(
    undisturbed: Path, compress: Callable[..., int], output: Path
) -> None:
    assert compress() == 0
    assert (output / "plan.svg").read_bytes() == (undisturbed / "plan.svg").read_bytes()
    assert (output / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()


def test_a_written_plan_that_is_followed_gives_the_same_weights(
    undisturbed: Path, compress: Callable[..., int], output: Path
) -> None:
    assert compress("--plan", str(undisturbed / "plan.json")) == 0
    assert read(output, "plan.json") == read(undisturbed, "plan.json")
    weights = "model.safetensors"
    assert sha256_of_file(output / weights) == sha256_of_file(undisturbed / weights)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--plan", "no-such-plan.json"],
        ["--method", "no-such-method"],
        ["--effort", "no-such-effort"],
    ],
)
def test_a_choice_that_does_not_exist_is_a_usage_error(
    arguments: list[str],
    compress: Callable[..., int],
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compress(*arguments) == 2
    assert arguments[1] in capsys.readouterr().err
    assert not output.exists()


def test_a_plan_of_another_model_is_refused(
    undisturbed: Path,
    tmp_path: Path,
    compress: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = read(undisturbed, "plan.json")
    plan["layers"].popitem()
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert compress("--plan", str(tmp_path / "plan.json")) == 3
    assert "another model" in capsys.readouterr().err


@pytest.mark.parametrize("method", [DEFAULT_METHOD, "svd-llm"])
def test_too_few_tokens_for_the_widths_are_refused_with_how_many_are_needed(
    method: str, compress: Callable[..., int], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The widest input, of down_proj, has 64 entries.
    assert compress("--method", method, "--windows", "1") == 3
    message = capsys.readouterr().err
    assert "32 tokens" in message
    assert "at least 64 tokens" in message
    assert "--windows" in message
    assert not output.exists()


def test_a_budget_that_no_plan_can_meet_is_refused_with_one_that_works(
    compress: Callable[..., int], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress("--keep-params", "0.001") == 2
    found = re.search(r"at least (0\.\d+)", capsys.readouterr().err)
    assert found
    assert not output.exists()
    assert compress("--keep-params", found[1]) == 0
    assert read(output, "report.json")["totals"]["kept_fraction"] <= float(found[1])


@pytest.mark.parametrize(("owner", "name"), [(BackwardSweep, "backward"), (FinishedLayers, "add")])
def test_an_interrupted_survey_resumes_to_the_same_bytes(
    owner: type,
    name: str,
    compress: Callable[..., int],
    output: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[int] = []
    whole = getattr(owner, name)

    def stop_at_the_second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop_at_the_second)
        assert compress() == 130
    assert "with --resume continues" in capsys.readouterr().err
    survey = partial_path(output) / "survey"
    assert (survey / "layers" / "model.layers.1.safetensors").exists()
    assert not (survey / "layers" / "model.layers.0.safetensors").exists()

    assert compress("--resume", "--seed", "1") == 3
    assert "differs in seed" in capsys.readouterr().err

    assert compress("--resume") == 0
    weights = "model.safetensors"
    assert sha256_of_file(output / weights) == sha256_of_file(undisturbed / weights)
    assert read(output, "plan.json") == read(undisturbed, "plan.json")
    assert {path.name for path in output.iterdir()} == {p.name for p in undisturbed.iterdir()}


def test_a_model_too_large_for_float32_is_compressed_as_published(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "published"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text(
        "".join(random.Random(0).choices(string.ascii_letters, k=999))
    )
    arguments = ["compress", "-m", str(folder), *SETTINGS]
    arguments += ["--calibration", str(tmp_path / "text.txt"), "-o"]
    assert main([*arguments, str(tmp_path / "roomy")]) == 0
    monkeypatch.setattr(load.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert main([*arguments, str(output)]) == 0
    assert read(tmp_path / "roomy", "recipe.json")["held_dtype"] == "float32"
    assert read(output, "recipe.json")["held_dtype"] == "bfloat16"
    paths = (tmp_path / "roomy", output)
    roomy, narrow = (densify_(load_checkpoint(path)).float() for path in paths)
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    original = load.load_model(str(folder)).model
    with torch.no_grad():
        expected = original(tokens).logits.log_softmax(-1)
        lost = [
            (expected.exp() * (expected - model(tokens).logits.log_softmax(-1))).sum(-1).mean()
            for model in (roomy, narrow)
        ]
    # Rounding activations to bfloat16 changes which ranks are chosen, and little else.
    assert lost[1] < 1.5 * lost[0]


def test_a_plan_that_was_edited_since_the_interruption_is_refused(
    undisturbed: Path,
    tmp_path: Path,
    compress: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes((undisturbed / "plan.json").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_build_report", None)  # Fails behind the last layer.
        assert compress("--plan", str(path)) == 1
    plan = read(tmp_path, "plan.json")
    first = next(g for g in plan["layers"]["model.layers.0"] if g["form"] != "dense")
    first["rank"] -= 1
    path.write_text(json.dumps(plan))
    assert compress("--plan", str(path), "--resume") == 3
    assert "differs in plan" in capsys.readouterr().err
    assert compress("--plan", str(path)) == 0


def test_a_dry_run_searches_the_plan_that_compressing_follows(
    undisturbed: Path,
    compress: Callable[..., int],
    output: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert compress("--dry-run", "--json", "--effort", DEFAULT_EFFORT) == 0
    shown = json.loads(capfd.readouterr().out)
    groups = [g for layer in read(undisturbed, "plan.json")["layers"].values() for g in layer]
    assert [g["rank"] for g in shown["groups"]] == [g["rank"] for g in groups]
    assert [g["expected_kl"] for g in shown["groups"]] == [g["expected_kl"] for g in groups]
    assert not output.exists()
