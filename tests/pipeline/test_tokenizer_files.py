"""What lies beside a tokenizer is copied by name alone, and only what belongs to the model."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.model.check import check_folder
from pipeline.runtime.tokenizer import load_tokenizer, load_whole_tokenizer
from pipeline.tokenizer_files import (
    LARGEST_TOKENIZER_BYTES,
    copy_tokenizer,
    require_small_tokenizer,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_only_known_names_are_copied_with_the_mode_of_a_new_file(model: Path, out: Path) -> None:
    (model / "tokenizer.json").chmod(0o6777)
    for name in ("tokenizer_evil.py", "tokenizer.bin", "x.jinja", "vocab.sh"):
        (model / name).write_text("x")
    (model / "tokenizer.d").mkdir()
    os.mkfifo(model / "tokenizer.fifo")
    copy_tokenizer(model, out)
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]
    assert stat.S_IMODE((out / "tokenizer.json").stat().st_mode) & 0o6111 == 0


def test_a_link_to_a_file_of_another_name_elsewhere_is_refused(model: Path, out: Path) -> None:
    secret = model.parent / "id_rsa"
    secret.write_text("secret")
    (model / "merges.txt").symlink_to(secret)
    with pytest.raises(InputError, match="link to"):
        copy_tokenizer(model, out)
    assert not (out / "merges.txt").exists()


def test_links_as_caches_and_users_make_them_are_followed(model: Path, out: Path) -> None:
    blobs = model.parent / "blobs"
    blobs.mkdir()
    (blobs / ("a" * 64)).write_text("blob")
    (model / "merges.txt").symlink_to(blobs / ("a" * 64))
    other = model.parent / "vocab.json"
    other.write_text("same name")
    (model / "vocab.json").symlink_to(other)
    copy_tokenizer(model, out)
    assert (out / "merges.txt").read_text() == "blob"
    assert (out / "vocab.json").read_text() == "same name"
    assert not (out / "merges.txt").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling"])
def test_what_is_no_file_is_refused(model: Path, out: Path, kind: str) -> None:
    path = model / "vocab.txt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(model / "nowhere")
    with pytest.raises(InputError, match="not a file of this model"):
        copy_tokenizer(model, out)


def test_a_tokenizer_of_more_than_256_mib_is_refused_by_every_loader(model: Path) -> None:
    (model / "config.json").write_text("{}")
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(LARGEST_TOKENIZER_BYTES)  # a hole: it takes no room
    require_small_tokenizer(model)
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(LARGEST_TOKENIZER_BYTES + 1)
    for load in (require_small_tokenizer, load_tokenizer, load_whole_tokenizer, check_folder):
        with pytest.raises(InputError, match=r"tokenizer\.json is not") as caught:
            load(model)
        assert "at most 256 MiB" in caught.value.details["expected"]
