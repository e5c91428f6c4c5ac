from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import dynamic_module_utils

from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import InputError, UsageError
from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.workers.workers import IN_PROCESS
from tests.support.elsewhere import Elsewhere
from tests.support.tiny_decoder import save_tiny_folder, tiny_llama
from validate.evaluate import EvaluateRequest, evaluate
from validate.subject import ModelPlace, Subject

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "tiny_own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_folder_opens_the_same_by_either_way(tmp_path: Path) -> None:
    folder = str(save_tiny_folder(tmp_path / "model"))
    by_folder, by_name = (
        Subject.open(ModelPlace(folder)),
        Subject._named(ModelPlace(folder), IN_PROCESS),
    )
    ids = np.arange(10)[None]
    expected = by_folder.session.forward(ids)
    np.testing.assert_array_equal(by_name.session.forward(ids), expected)
    assert by_name.stop_ids == by_folder.stop_ids == {257}


def test_a_compressed_checkpoint_opens_with_and_without_trust_in_its_code(tmp_path: Path) -> None:
    request = CompressRequest(
        str(save_tiny_folder(tmp_path / "original")),
        keep_params=0.7,
        windows=8,
        window_length=32,
        dtype="float32",
    )
    compress_to_folder(request, tmp_path / "checkpoint")
    ids, checkpoint = np.arange(10)[None], str(tmp_path / "checkpoint")
    plain, trusted = (
        Subject.open(ModelPlace(checkpoint, trust_remote_code=trust)).session.forward(ids)
        for trust in (False, True)
    )
    np.testing.assert_array_equal(plain, trusted)


def test_trusted_code_of_a_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "tiny_own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE)
    with pytest.raises(InputError, match="Python code of its own"):
        Subject.open(ModelPlace(str(folder)))
    subject = Subject.open(ModelPlace(str(folder), trust_remote_code=True))
    expected = TorchSession(tiny_llama()).forward(np.arange(10)[None])
    np.testing.assert_allclose(subject.session.forward(np.arange(10)[None]), expected, atol=5e-5)


def test_an_unknown_name_and_a_backend_that_cannot_read_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Unknown model"):
        Subject.open(ModelPlace(str(tmp_path / "nothing")))
    with pytest.raises(UsageError, match="exported folders only"):
        Subject.open(ModelPlace("smollm2-135m", "onnx"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A whale is a marine mammal. " * 40, encoding="utf-8")
    return path


def test_windows_are_measured_by_workers_as_here(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = (save_tiny_folder(tmp_path / name) for name in ("model", "other"))
    request = EvaluateRequest(
        str(model), text=text, windows=5, window_length=40, reference=str(other)
    )
    told: list[str] = []
    here = evaluate(request, told.append)
    # A path that the user wrote is one of this process's own folder.
    monkeypatch.chdir(tmp_path)
    request = replace(request, model="model", reference="other")
    elsewhere, told_there = Elsewhere(), list[str]()
    there = evaluate(request, told_there.append, elsewhere)
    for record in (here, there):
        del record["perplexity"]["seconds"]
    assert there["computed_by"] == {"workers": 2}
    assert here["computed_by"] == {}
    for key in ("perplexity", "reference", "backend"):
        assert there[key] == here[key]
    steps = [[line for line in lines if "perplexity" in line] for lines in (told, told_there)]
    assert steps[0] == steps[1]
    assert elsewhere.asked[2:] == [f"window {place} of the text" for place in range(1, 6)]


def test_a_model_that_workers_measure_is_not_opened_here(tmp_path: Path) -> None:
    model = save_tiny_folder(tmp_path / "model")
    subject = Subject.open(ModelPlace(str(model)), Elsewhere())
    windows = np.arange(80).reshape(2, 40)
    subject.quality(None, windows, lambda message: None)
    assert "session" not in vars(subject)
