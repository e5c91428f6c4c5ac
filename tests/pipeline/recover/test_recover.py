"""A recovered checkpoint is better, of the same ranks and bytes, and says how it was made."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.calibrate import sampled_text
from pipeline.calibrate.text import load_tokens
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.errors import InputError, PipelineError, ResourceError, UsageError
from pipeline.model.load import load_model
from pipeline.output import partial_path
from pipeline.recover import recover
from pipeline.recover.losses import _distillation_loss, _next_token_loss
from pipeline.recover.recover import (
    _fine_tuning,
    _require_same_tensors,
    recover_to_folder,
)
from pipeline.recover.request import Recoverable
from tests.support.families import FAMILIES, save_family, tiny_model
from tests.support.tiny_decoder import byte_tokenizer
from tests.support.tiny_recovery import save_small, tiny_request, write_train_text

RECOVERY: dict[str, Any] = {
    "objective": "next_token",
    "settings": {"lora_rank": 8, "steps": 500, "batch_size": 4, "teacher": None},
    "text": {"window_length": 512, "source": "train.txt", "seed": 3},
    "held_out_windows": 22,
    "loss": {"next_token": {"before": 4.25, "after": 3.5}},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def train_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_train_text(tmp_path_factory.mktemp("text") / "train.txt")


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_at_the_same_ranks_and_bytes(
    family: str, train_text: str, tmp_path: Path
) -> None:
    small = save_small(tmp_path, family, "float16")
    output = tmp_path / "better"
    recovery = recover_to_folder(tiny_request(small, train_text), output)
    loss = recovery["loss"]["next_token"]
    assert loss["after"] < 0.8 * loss["before"]
    weights = "model.safetensors"
    assert (output / weights).stat().st_size == (small / weights).stat().st_size
    before, after = load_file(small / weights), load_file(output / weights)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith((".up.weight", ".down.weight")) for name in changed)
    for file in ("config.json", "plan.json", "modeling_skipcat.py"):
        assert (output / file).read_bytes() == (small / file).read_bytes()


def test_the_losses_in_the_recipe_are_those_of_the_files(
    small: Path, train_text: str, tmp_path: Path
) -> None:
    teacher_folder = small.parent / "original"
    request = tiny_request(small, train_text, teacher=str(teacher_folder))
    recovery = recover_to_folder(request, tmp_path / "better")
    teacher = load_model(str(teacher_folder))
    windows = load_tokens(
        train_text, teacher.tokenizer, teacher.model, count=89, length=32, seed=0
    ).tokens[-8:]
    assert recovery["held_out_windows"] == len(windows)
    for when, folder in (("before", small), ("after", tmp_path / "better")):
        model = load_checkpoint(folder, dtype=torch.float32)
        with torch.no_grad():
            logits, target = model(windows).logits, teacher.model(windows).logits
        values = {
            "next_token": _next_token_loss(logits, windows).item(),
            "distillation": _distillation_loss(logits, target).item(),
        }
        for name, value in values.items():
            # Two batches here, one there.
            assert recovery["loss"][name][when] == pytest.approx(value, rel=1e-5)


def test_a_teacher_draws_the_student_to_its_distribution(small: Path, tmp_path: Path) -> None:
    request = tiny_request(small, "self", teacher=str(small.parent / "original"), steps=60)
    recovery = recover_to_folder(request, tmp_path / "better")
    loss = recovery["loss"]["distillation"]
    assert recovery["objective"] == "distillation"
    assert loss["after"] < 0.9 * loss["before"]
    assert "sampled from" in recovery["text"]["details"]["text"]


def test_windows_are_sampled_in_parts_and_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_model(str(small.parent / "original"))
    monkeypatch.setattr(sampled_text, "_TOKENS_AT_ONCE", 64)
    request, kept = tiny_request(small, "self", windows=5, seed=4), tmp_path / "tokens.safetensors"
    first = recover._recovery_windows(request, source, source, kept)
    assert first.tokens.shape == (5, 32)
    assert len(first.tokens.unique(dim=0)) == 5
    monkeypatch.setattr(recover, "load_tokens", None)
    again = recover._recovery_windows(request, source, source, kept)
    assert again.describe() == first.describe()


def test_the_recipe_keeps_the_compression_and_adds_the_recovery(
    small: Path, train_text: str, tmp_path: Path
) -> None:
    output = tmp_path / "better"
    recovery = recover_to_folder(tiny_request(small, train_text), output)
    recipe = json.loads((output / "recipe.json").read_text())
    compression = json.loads((small / "recipe.json").read_text())
    assert recipe == compression | {"recovery": recovery}
    assert recovery["settings"]["lora_rank"] == 4
    assert len(recovery["text"]["sha256"]) == 64
    assert recovery["peft"].startswith("0.")
    losses = json.loads((output / "recovery.json").read_text())["losses"]
    assert len(losses) == 20
    largest = max(
        tensor.abs().max().item()
        for name, tensor in load_file(output / "model.safetensors").items()
        if name.endswith(".down.weight")
    )
    report = json.loads((output / "report.json").read_text())
    assert report["totals"]["largest"] == largest


def test_the_card_says_how_the_factors_were_trained_and_what_it_won(
    small: Path, train_text: str, tmp_path: Path
) -> None:
    recover_to_folder(tiny_request(small, train_text, steps=2), tmp_path / "better")
    card = (tmp_path / "better" / "README.md").read_text()
    assert "No fine-tuning" not in card
    assert "adapters of rank 4" in card
    assert "when it was compressed" in card
    card = _fine_tuning(RECOVERY)
    for fact in (
        "rank 8",
        "500 steps of 4 windows of 512 tokens from train.txt",
        "seed 3",
        "22 windows held out",
        "4.2500 before and 3.5000 after",
        "cross entropy",
    ):
        assert fact in card


def test_the_card_of_a_distilled_checkpoint_names_the_teacher() -> None:
    changes: dict[str, Any] = {
        "objective": "distillation",
        "settings": {**RECOVERY["settings"], "teacher": "big-model"},
        "loss": {"distillation": {"before": 1.0, "after": 0.5}},
    }
    assert "KL divergence from big-model" in _fine_tuning({**RECOVERY, **changes})


def test_a_recovery_of_a_recovery_keeps_both_records(
    small: Path, train_text: str, tmp_path: Path
) -> None:
    first = recover_to_folder(tiny_request(small, train_text, steps=2), tmp_path / "one")
    request = tiny_request(tmp_path / "one", train_text, steps=3)
    second = recover_to_folder(request, tmp_path / "two")
    assert second["earlier"] == first
    assert second["loss"]["next_token"]["before"] == first["loss"]["next_token"]["after"]
    assert "earlier ones" in (tmp_path / "two" / "README.md").read_text()


def test_bfloat16_changes_the_arithmetic_and_not_the_types(
    small: Path, train_text: str, tmp_path: Path
) -> None:
    plain = recover_to_folder(tiny_request(small, train_text), tmp_path / "plain")
    mixed = recover_to_folder(tiny_request(small, train_text, bfloat16=True), tmp_path / "mixed")
    losses = [record["loss"]["next_token"] for record in (plain, mixed)]
    assert losses[0]["before"] == losses[1]["before"]  # measured in float32 either way
    # Eight bits of mantissa in the products, averaged over 20 steps.
    assert losses[1]["after"] == pytest.approx(losses[0]["after"], rel=0.05)
    _require_same_tensors(tmp_path / "plain", tmp_path / "mixed")


def test_the_output_may_replace_the_input(small: Path, train_text: str, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    recover_to_folder(tiny_request(folder, train_text, steps=1), folder, overwrite=True)
    assert "recovery" in json.loads((folder / "recipe.json").read_text())
    assert load_checkpoint(folder)


def test_other_tensors_than_before_are_an_error(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "small")
    tensors = load_file(small / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.up.weight"))
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PipelineError, match="changed the tensors") as caught:
        _require_same_tensors(small, tmp_path / "small")
    assert caught.value.details["where"] == name


def test_a_result_of_another_size_never_appears(
    small: Path, train_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save: Any = recover.save_checkpoint
    monkeypatch.setattr(
        recover,
        "save_checkpoint",
        lambda *arguments, **more: save(*arguments[:-1], torch.float16, **more),
    )
    with pytest.raises(PipelineError, match="changed the tensors"):
        recover_to_folder(tiny_request(small, train_text, steps=1), tmp_path / "better")
    assert not (tmp_path / "better").exists()


def test_a_teacher_with_another_vocabulary_is_refused(
    small: Path, train_text: str, tmp_path: Path
) -> None:
    tiny_model("llama", vocab_size=280).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    request = tiny_request(small, train_text, teacher=str(tmp_path / "other"))
    with pytest.raises(InputError, match="another vocabulary") as caught:
        recover_to_folder(request, tmp_path / "better")
    assert "280 logits" in caught.value.details["observed"]
    assert "272 logits" in caught.value.details["expected"]
    assert not partial_path(tmp_path / "better").exists()


def test_a_model_that_is_not_compressed_is_refused(train_text: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "dense", "llama")
    with pytest.raises(InputError, match="no factored layers"):
        recover_to_folder(tiny_request(folder, train_text), tmp_path / "better")


def test_an_image_classifier_is_refused_before_its_weights_are_read(
    small: Path, train_text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "sees"
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("tokenizer_config.json"))
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InputError, match="decoder language models"):
        Recoverable.read(tiny_request(folder, train_text))


@pytest.mark.parametrize("record", ["recipe.json", "report.json"])
def test_a_checkpoint_without_its_records_is_refused(
    record: str, small: Path, train_text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    (folder / record).unlink()
    with pytest.raises(InputError, match="record of the checkpoint is missing") as caught:
        recover_to_folder(tiny_request(folder, train_text), tmp_path / "better")
    assert record in caught.value.details["where"]


def test_a_full_disk_is_noticed_before_anything_is_trained(
    small: Path, train_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "fine_tune", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match="disk space"):
        recover_to_folder(tiny_request(small, train_text), tmp_path / "better")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"steps": 0}, "--steps"),
        ({"lora_rank": 0}, "--lora-rank"),
        ({"lora_alpha": 0}, "--lora-alpha"),
        ({"batch_size": 0}, "--batch-size"),
        ({"window_length": 1}, "--window-length"),
        ({"windows": 4}, "--windows"),  # one held out leaves three for a batch of four
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"device": "toaster"}, "--device"),
        ({"text": "self"}, "--text self"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_read(
    changes: dict[str, object], flag: str
) -> None:
    request = replace(tiny_request(Path("no-such-folder"), "no-such-text"), **changes)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        request.check()
    assert caught.value.details["where"] == flag
