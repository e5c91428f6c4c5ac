from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.cli.main import main
from pipeline.compress import walk as compress
from pipeline.compress.plan.plan import GroupPlan
from pipeline.model import load
from pipeline.output import partial_path
from tests.support.families import save_family
from tests.support.tiny_decoder import byte_tokenizer

SETTINGS = ["--calibration", "self", "--windows", "4", "--window-length", "32"]
WRITTEN = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_quantized.py",
    "modeling_skipcat.py",
    "plan.json",
    "plan.svg",
    "recipe.json",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(tmp_path_factory.mktemp("original") / "tiny", "qwen2"))


@pytest.fixture(scope="module")
def compressed(original: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that nothing disturbed; not to be written to."""
    folder = tmp_path_factory.mktemp("compressed") / "small"
    assert main(["compress", "-m", original, "-o", str(folder), *SETTINGS]) == 0
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "small"


@pytest.fixture
def interrupted(
    original: str,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """The output of a run that Ctrl-C stopped in its second layer."""
    factor = compress.submit_fit

    def stop_after_one(workers: Any, group: GroupPlan, *rest: Any) -> Any:
        if group.members[0].startswith("model.layers.1"):
            raise KeyboardInterrupt
        return factor(workers, group, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(compress, "submit_fit", stop_after_one)
        assert main(["compress", "-m", original, "-o", str(output), *SETTINGS]) == 130
    assert "with --resume continues" in capsys.readouterr().err
    return output


def test_a_checkpoint_is_written_whole(compressed: Path) -> None:
    assert {path.name for path in compressed.iterdir()} == WRITTEN
    assert [path.name for path in compressed.parent.iterdir()] == [compressed.name]
    report = json.loads((compressed / "report.json").read_text())
    assert report["totals"]["factored"] > 0
    assert 0.75 < report["totals"]["kept_fraction"] <= 0.8
    recipe = json.loads((compressed / "recipe.json").read_text())
    assert recipe["settings"]["windows"] == 4
    assert recipe["calibration"]["tokens"] == 128


def test_the_same_command_writes_the_same_bytes_and_prints_json(
    original: str, compressed: Path, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "-m", original, "-o", str(output), *SETTINGS, "--json"]) == 0
    captured = capfd.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((output / "report.json").read_text())
    assert "sampled from the model itself" in captured.err
    assert weights_hash(output) == weights_hash(compressed)


@pytest.mark.parametrize("kept", ["0", "-0.5", "1.01", "nan", "inf"])
def test_a_kept_fraction_out_of_range_is_refused_before_anything_is_loaded(
    kept: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Looking for the model would end in status 3.
    arguments = ["compress", "-m", "no-such-model", "-o", str(output), "--keep-params", kept]
    assert main(arguments) == 2
    assert "(0, 1]" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("flag", ["--windows", "--window-length", "--rank-multiple"])
def test_a_count_below_one_is_refused_before_anything_is_loaded(
    flag: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "-m", "no-such-model", "-o", str(output), flag, "0"]) == 2
    assert flag in capsys.readouterr().err


def test_an_existing_output_is_refused_before_anything_is_loaded(
    compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights_hash(compressed)
    assert main(["compress", "-m", "no-such-model", "-o", str(compressed)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert weights_hash(compressed) == before


def test_overwrite_replaces_the_whole_folder(original: str, compressed: Path, output: Path) -> None:
    shutil.copytree(compressed, output)
    (output / "stale.txt").write_text("of an earlier run")
    arguments = ["compress", "-m", original, "-o", str(output), *SETTINGS]
    assert main(arguments) == 2
    assert main([*arguments, "--overwrite"]) == 0
    assert {path.name for path in output.iterdir()} == WRITTEN
    assert weights_hash(output) == weights_hash(compressed)


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    original: str, compressed: Path, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", "-m", original, "-o", str(output), *SETTINGS, "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert main(arguments) == 0
    assert "q_proj" in capfd.readouterr().out
    assert list(output.parent.iterdir()) == []
    report = json.loads((compressed / "report.json").read_text())
    assert shown["kept_fraction"] == report["totals"]["kept_fraction"]
    assert [group["rank"] for group in shown["groups"]] == [g["rank"] for g in report["groups"]]


def test_an_interrupted_run_leaves_a_partial_folder_and_no_output(interrupted: Path) -> None:
    assert not interrupted.exists()
    layers = {path.name for path in (partial_path(interrupted) / "layers").iterdir()}
    assert layers == {"progress.json", "model.layers.0.safetensors"}


def test_a_resumed_run_computes_the_rest_and_ends_in_the_same_bytes(
    interrupted: Path, original: str, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = set()
    factor = compress.submit_fit

    def counting(workers: Any, group: GroupPlan, *rest: Any) -> Any:
        computed.add(group.members[0][: len("model.layers.1")])
        return factor(workers, group, *rest)

    monkeypatch.setattr(compress, "submit_fit", counting)
    arguments = ["compress", "-m", original, "-o", str(interrupted), *SETTINGS, "--resume"]
    assert main(arguments) == 0
    assert computed == {"model.layers.1"}
    assert weights_hash(interrupted) == weights_hash(compressed)
    assert {path.name for path in interrupted.iterdir()} == WRITTEN
    assert not partial_path(interrupted).exists()
    reports = [json.loads((f / "report.json").read_text()) for f in (interrupted, compressed)]
    assert reports[0]["groups"] == reports[1]["groups"]


def test_a_finished_layer_that_was_damaged_is_computed_again(
    interrupted: Path, original: str, compressed: Path
) -> None:
    path = partial_path(interrupted) / "layers" / "model.layers.0.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    arguments = ["compress", "-m", original, "-o", str(interrupted), *SETTINGS, "--resume"]
    assert main(arguments) == 0
    assert weights_hash(interrupted) == weights_hash(compressed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--keep-params", "0.6"], "keep_params"),
        (["--no-skip"], "skip"),
        (["--seed", "1"], "seed"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_keeps_what_was_done(
    changed: list[str],
    named: str,
    interrupted: Path,
    original: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["compress", "-m", original, "-o", str(interrupted), *SETTINGS, "--resume"]
    assert main([*arguments, *changed]) == 3
    assert f"differs in {named}" in capsys.readouterr().err
    assert (partial_path(interrupted) / "layers" / "model.layers.0.safetensors").exists()


def test_without_resume_an_unfinished_run_is_discarded_with_a_note(
    interrupted: Path, original: str, compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "-m", original, "-o", str(interrupted), *SETTINGS]) == 0
    assert "is discarded" in capsys.readouterr().err
    assert weights_hash(interrupted) == weights_hash(compressed)


def test_a_full_disk_is_noticed_before_anything_is_written(
    original: str,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["compress", "-m", original, "-o", str(output), *SETTINGS]) == 4
    assert "Not enough disk space" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (b"too short", 3, "at least 128 tokens"),
        (b"\xff\xfe not UTF-8", 3, "UTF-8"),
        (None, 3, "cannot be read"),
    ],
)
def test_a_text_that_cannot_serve_is_refused(
    text: bytes | None,
    status: int,
    message: str,
    original: str,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text)
    arguments = ["compress", "-m", original, "-o", str(output), *SETTINGS]
    assert main([*arguments, "--calibration", str(path)]) == status
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_windows_beyond_the_models_context_are_refused_before_its_weights_are_read(
    extra: list[str],
    original: str,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(load, "AutoModelForCausalLM", None)
    arguments = ["compress", "-m", original, "-o", str(output), "--window-length", "257", *extra]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "--window-length" in message
    assert "at most 256" in message
    assert list(output.parent.iterdir()) == []


def conv1d_model() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=1, n_head=2, n_embd=32, vocab_size=272, bos_token_id=256, eos_token_id=257
        )
    )


def expert_model() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=272,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


def encoder_model() -> PreTrainedModel:
    """Loads as a causal language model, since its config does not say that it is none."""
    config = BertConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    return BertLMHeadModel(config)


def encoder_decoder_model() -> PreTrainedModel:
    config = T5Config(vocab_size=272, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (conv1d_model, "Conv1D"),
        (expert_model, "Router"),
        (encoder_model, "bert; a change of the last token changes earlier logits"),
        (encoder_decoder_model, "t5"),
    ],
)
def test_other_kinds_of_models_are_refused_with_what_was_found(
    make: Callable[[], PreTrainedModel],
    found: str,
    tmp_path: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    make().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert main(["compress", "-m", str(folder), "-o", str(output), *SETTINGS]) == 3
    assert found in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("name", ["no-such-model", "no-one/nothing"])
def test_a_model_that_cannot_be_found_has_status_3(
    name: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "-m", name, "-o", str(output)]) == 3
    assert name in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


def test_a_compressed_checkpoint_is_not_compressed_again(
    compressed: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "-m", str(compressed), "-o", str(output)]) == 3
    assert "export-dense" in capsys.readouterr().err


def test_activations_that_are_not_finite_name_the_layer(
    original: str, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    folder = tmp_path / "broken"
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 100)
    arguments = ["compress", "-m", str(folder), "-o", str(output), *SETTINGS]
    assert main([*arguments, "--calibration", str(text)]) == 3
    assert "model.layers.1" in capsys.readouterr().err
    assert not output.exists()
