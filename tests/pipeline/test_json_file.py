"""JSON of others is refused in our words, whatever it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.json_file import LARGEST_BYTES, json_field, parse_json, read_json_object


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 200_000, "deeper"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "deeper"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "digits"),
        (b'{"a": "\xff"}', "byte 0xff at 7"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"\\ud83d": 1}', "surrogate"),
        (b"[]", "a list"),
        (b'"x"', "a text"),
        (b"5", "5"),
        (b"null", "null"),
        (b" " * (LARGEST_BYTES + 1), "too large"),
    ],
)
def test_a_file_that_holds_no_object_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_json_object(tmp_path / "x.json")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_json_object(tmp_path / "x.json")
    with pytest.raises(InputError, match="Is a directory"):
        read_json_object(tmp_path)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), (1, bool), (1.5, int), ("1", int), (float("inf"), float), (float("nan"), float),
     (10**400, float), ([], dict), (None, str), (1, str)],
)  # fmt: skip
def test_a_field_of_another_type_is_refused(value: Any, kind: type) -> None:
    with pytest.raises(InputError, match="The field 'a' is wrong"):
        json_field({"a": value}, "a", kind, "x.json")


def test_a_field_may_be_left_out_only_where_there_is_a_default() -> None:
    assert json_field({}, "a", int, "x.json", default=3) == 3
    assert json_field({"a": None}, "a", int, "x.json", default=None) is None
    assert json_field({"a": 2}, "a", float, "x.json") == 2.0
    with pytest.raises(InputError, match="missing"):
        json_field({}, "a", int, "x.json")


def test_a_line_names_its_place() -> None:
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 7"):
        parse_json("{", "prompts.jsonl, line 7")
