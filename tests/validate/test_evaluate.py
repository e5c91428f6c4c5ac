from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import dynamic_module_utils

from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import InputError, UsageError
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import save_tiny_folder, tiny_llama
from validate.evaluate import _open_named, _open_subject

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "tiny_own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_folder_opens_the_same_by_either_way(tmp_path: Path) -> None:
    folder = str(save_tiny_folder(tmp_path / "model"))
    by_folder, by_name = _open_subject(folder), _open_named(folder, trust_remote_code=False)
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
    ids = np.arange(10)[None]
    plain, trusted = (
        _open_subject(str(tmp_path / "checkpoint"), trust_remote_code=trust).session.forward(ids)
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
        _open_subject(str(folder))
    subject = _open_subject(str(folder), trust_remote_code=True)
    expected = TorchSession(tiny_llama()).forward(np.arange(10)[None])
    np.testing.assert_allclose(subject.session.forward(np.arange(10)[None]), expected, atol=5e-5)


def test_an_unknown_name_and_a_backend_that_cannot_read_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Unknown model"):
        _open_subject(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="exported folders only"):
        _open_subject("smollm2-135m", "onnx")
