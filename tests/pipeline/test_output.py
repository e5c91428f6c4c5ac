"""An output is refused at once where it could not be written, or where something would be lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artefact import staged_folder
from pipeline.errors import UsageError
from pipeline.output import check_output, check_output_file
from pipeline.provenance import public_name, public_text

RECORD = json.dumps({"schema": 1, "provenance": {"tool": "skipcat"}})


def result(folder: Path) -> Path:
    """A folder that skipcat could have written."""
    folder.mkdir(parents=True)
    (folder / "export.json").write_text(RECORD)
    return folder


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_folder_of_ours_may_be_replaced_and_an_empty_one_filled(tmp_path: Path) -> None:
    check_output(result(tmp_path / "ours"), overwrite=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("empty", "link", "new", "a/b/new"):
        check_output(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", "{}", '{"provenance": {"tool": "other"}}', '{"provenance": "skipcat"}'],
)
@pytest.mark.parametrize("record", ["manifest.json", "recipe.json"])
def test_a_folder_of_something_else_is_never_replaced(
    content: str | None, record: str, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if content is not None:
        (tmp_path / record).write_text(content)
    with pytest.raises(UsageError, match="not written by skipcat"):
        check_output(tmp_path, overwrite=True)


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    output = result(tmp_path / "out")
    inside = result(output / "ck")
    (tmp_path / "link").symlink_to(inside)
    for given in (output, inside, tmp_path / "link", output / "export.json", f"self+{inside}"):
        with pytest.raises(UsageError, match="holds an input"):
            check_output(output, overwrite=True, inputs=("smollm2-135m", given))
    check_output(inside, overwrite=True, inputs=(tmp_path / "other", "no/such"))


@pytest.mark.parametrize("below", ["", "project"])
def test_the_working_and_the_home_folder_and_those_above_them_are_never_replaced(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = result(tmp_path / "out")
    (output / below).mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(output / below))
        with pytest.raises(UsageError, match="not replaced"):
            check_output(output, overwrite=True)
    monkeypatch.chdir(output / below)
    with pytest.raises(UsageError, match="not replaced"):
        check_output(output, overwrite=True)
    for root in (Path("/"), Path(".."), output):
        with pytest.raises(UsageError):
            check_output(root, overwrite=True)


def make_file(root: Path) -> Path:
    (root / "file").write_text("x")
    return root / "file"


def make_below_a_file(root: Path) -> Path:
    return make_file(root) / "out"


def make_dangling_link(root: Path) -> Path:
    (root / "link").symlink_to("nowhere")
    return root / "link"


def make_loop(root: Path) -> Path:
    (root / "loop").symlink_to("loop")
    return root / "loop"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        make_file,
        make_below_a_file,
        make_dangling_link,
        make_loop,
        lambda root: root / ("n" * 250),
        lambda root: root / ("n" * 300),
        lambda root: root / "/".join(["deep"] * 900),
    ],
    ids=["file", "below a file", "dangling", "loop", "long name", "too long", "long path"],
)
def test_what_cannot_become_a_folder_is_refused_at_once(
    make: Callable[[Path], Path], overwrite: bool, tmp_path: Path
) -> None:
    output = make(tmp_path)
    before = names_below(tmp_path)
    with (
        pytest.raises(UsageError),
        staged_folder(output, overwrite=overwrite),
    ):
        pytest.fail("the work was begun")
    assert names_below(tmp_path) == before


def test_a_folder_without_permission_to_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root
    with pytest.raises(UsageError, match="no permission"):
        check_output(tmp_path / "out")
    with pytest.raises(UsageError, match="no permission"):
        check_output(tmp_path)


def test_result_files_are_replaced_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(RECORD)
    (tmp_path / "b.json").write_text("")
    (tmp_path / "c.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    for name in ("a.json", "b.json", "c.svg", "new.json"):
        check_output_file(tmp_path / name, overwrite=True)
    with pytest.raises(UsageError, match="--overwrite"):
        check_output_file(tmp_path / "a.json")
    (tmp_path / "thesis.json").write_text('{"years": "of work"}')
    (tmp_path / "thesis.svg").write_text("years of work")
    for name in ("thesis.json", "thesis.svg", ".", "a.json/below.json", "n" * 256):
        with pytest.raises(UsageError):
            check_output_file(tmp_path / name, overwrite=True)


def test_a_path_is_published_by_its_last_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert public_name(tmp_path / "text.txt") == "text.txt"
    assert public_name("/home/me/secret/model") == "model"
    assert public_name(f"self+{tmp_path / 'text.txt'}") == "self+text.txt"
    assert public_name("./text.txt") == "text.txt"
    assert public_name(".") == tmp_path.name
    for name in ("self", "wikitext2+c4", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M"):
        assert public_name(name) == name


def test_of_paths_within_a_text_the_last_parts_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, away = tmp_path / "my self", tmp_path / "away"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    told = f"Load from {away}/b/model.onnx failed: ('{home}/c/x.json', \"file://{away}/d.txt\")"
    assert public_text(told) == "Load from model.onnx failed: ('x.json', \"d.txt\")"
    for text in ("https://host/a/b/c", "3 / 4 tokens/s", "node /model/layers.0/Add, a/b/c"):
        assert public_text(text) == text
