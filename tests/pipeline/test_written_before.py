"""Folders that an earlier version wrote still load, run and validate as they did then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from pipeline.engine.manifest import read_manifest
from pipeline.engine.profiles import ShapeProfile
from pipeline.runtime.sessions.image_sessions import OnnxImages
from pipeline.runtime.sessions.open_session import open_session

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_before"
CHECKPOINTS = ("checkpoint", "checkpoint-bits")
# The exports, and what each was made from.
ONNX = {
    "onnx-opset24": "checkpoint",
    "onnx-compat": "checkpoint",
    "onnx-cpu": "checkpoint",
    "onnx-cpu-stored": "checkpoint-bits",
}
# Each of the first tokens of its answers leads by a quarter of a nat, on every backend.
PROMPT = "psubc"
ROUNDED = "onnx-cpu"  # to 4 bits by the export: not equal to its checkpoint, and not judged
FORMS = {"skip", "low_rank", "dense"}


def expected(kind: str) -> Any:
    return json.loads((WRITTEN / kind / "expected.json").read_text(encoding="utf-8"))


def token_batch() -> np.ndarray:
    return (np.arange(24, dtype=np.int64).reshape(2, 12) * 37 + 5) % 256


def pixel_batch() -> np.ndarray:
    places = np.arange(2 * 3 * 16 * 16, dtype=np.float32).reshape(2, 3, 16, 16)
    return np.sin(places * 0.37).astype(np.float32)


def numbers(logits: np.ndarray) -> list[list[float]]:
    """The first twenty logits of each row."""
    return [[round(float(value), 6) for value in row[:20]] for row in logits]


def last_logits(kind: str) -> list[list[float]]:
    """Behind the last token of each row; the rows one after another, as `skipcat run` reads."""
    session = open_session(WRITTEN / kind)
    rows = []
    for row in token_batch():
        session.reset()
        rows.append(session.forward(row[None], last_only=True)[0, -1])
    return numbers(np.stack(rows))


def checkpoint_classes(kind: str) -> list[list[float]]:
    model = load_checkpoint(WRITTEN / kind, dtype=torch.float32)
    with torch.no_grad():
        return numbers(model(pixel_values=torch.from_numpy(pixel_batch())).logits.numpy())


def onnx_classes(kind: str) -> list[list[float]]:
    return numbers(OnnxImages(WRITTEN / kind, kind).classify(pixel_batch()))


def greedy(kind: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    arguments = ["-p", PROMPT, "--raw", "--max-new-tokens", "6", "--json"]
    assert main(["run", str(WRITTEN / kind), *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    return {name: answer[name] for name in ("text", "prompt_tokens", "new_tokens", "ended")}


def validated(
    original: str,
    checkpoint: str,
    onnx: list[str],
    inputs: list[str],
    capsys: pytest.CaptureFixture[str],
) -> dict[str, str]:
    """The verdict on each stage."""
    capsys.readouterr()
    arguments = ["--original", str(WRITTEN / original), "--checkpoint", str(WRITTEN / checkpoint)]
    for kind in onnx:
        arguments += ["--onnx", str(WRITTEN / kind)]
    status = main(["validate", *arguments, *inputs, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert status == 0, rows
    return {row["name"]: row["verdict"]["status"] for row in rows}


def close(own: list[list[float]], kind: str) -> None:
    wanted = expected(kind)
    np.testing.assert_allclose(own, wanted["logits"], rtol=0, atol=wanted["tolerance"])


@pytest.mark.parametrize("kind", [*CHECKPOINTS, *ONNX])
def test_a_decoder_written_before_gives_the_logits_it_gave_then(kind: str) -> None:
    close(last_logits(kind), kind)


@pytest.mark.parametrize("kind", [*CHECKPOINTS, *ONNX])
def test_a_decoder_written_before_answers_as_it_did_then(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert greedy(kind, capsys) == expected(kind)["answer"]


def test_a_classifier_written_before_gives_the_logits_it_gave_then() -> None:
    close(checkpoint_classes("checkpoint-classifier"), "checkpoint-classifier")
    close(onnx_classes("onnx-classifier"), "onnx-classifier")


@pytest.mark.parametrize("kind", [*CHECKPOINTS, "checkpoint-classifier"])
def test_a_checkpoint_written_before_is_held_in_the_modules_and_tensors_of_then(kind: str) -> None:
    assert held(load_checkpoint(WRITTEN / kind)) == expected(kind)["held"]


def held(model: PreTrainedModel) -> dict[str, str]:
    """Type and shape of every tensor by its name in the state."""
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in sorted(model.state_dict().items())
    }


def test_every_form_of_a_matrix_is_among_what_was_written() -> None:
    plan = json.loads((WRITTEN / "checkpoint" / "plan.json").read_text(encoding="utf-8"))
    assert {group["form"] for layer in plan["layers"].values() for group in layer} == FORMS
    plan = json.loads((WRITTEN / "checkpoint-bits" / "plan.json").read_text(encoding="utf-8"))
    styles = {group["up_style"] for layer in plan["layers"].values() for group in layer}
    assert styles == {"int4-b32-asym", "int8-b32-sym", "int4-b32-offset"}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_decoders_written_before_pass_validation(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = [kind for kind, source in ONNX.items() if source == checkpoint]
    inputs = ["--text", str(WRITTEN / "text.txt"), "--windows", "5", "--window-length", "32"]
    inputs += ["--prompts", "2", "--max-new-tokens", "4"]
    verdicts = validated("decoder", checkpoint, onnx, inputs, capsys)
    assert verdicts == {
        "original": "measured",
        "compressed, dense product": "measured",
        "compressed, skip form": "pass",
        **{f"onnxruntime {kind}": "measured" if kind == ROUNDED else "pass" for kind in onnx},
    }


@pytest.mark.slow
def test_classifiers_written_before_pass_validation(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = ["--images", str(WRITTEN / "images.npz")]
    onnx = ["onnx-classifier"]
    verdicts = validated("classifier", "checkpoint-classifier", onnx, inputs, capsys)
    assert verdicts["compressed, skip form"] == verdicts["onnxruntime onnx-classifier"] == "pass"


def test_a_plan_written_before_is_followed(capsys: pytest.CaptureFixture[str]) -> None:
    plan = WRITTEN / "plan" / "plan.json"
    arguments = ["-m", str(WRITTEN / "decoder"), "-o", "never-written", "--plan", str(plan)]
    capsys.readouterr()
    assert main(["compress", *arguments, "--dry-run", "--json"]) == 0
    followed, wanted = json.loads(capsys.readouterr().out), expected("plan")
    assert followed["kept_fraction"] == wanted["kept_fraction"]
    assert len(followed["groups"]) == len(wanted["groups"])
    for now, then in zip(followed["groups"], wanted["groups"], strict=True):
        assert {name: now[name] for name in then} == then


def test_the_manifest_of_an_engine_written_before_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, wanted = WRITTEN / "engine", expected("engine")
    profiles = [ShapeProfile.from_json(entry) for entry in read_manifest(folder)["profiles"]]
    assert [profile.to_json() for profile in profiles] == wanted
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["profiles"]) == ("engine folder", wanted)


@pytest.mark.parametrize("kind", [*CHECKPOINTS, *ONNX, "checkpoint-classifier", "onnx-classifier"])
def test_a_folder_written_before_is_known_for_what_it_is(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["inspect", str(WRITTEN / kind), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected(kind)["facts"]
