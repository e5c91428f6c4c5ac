"""What rounding cost, as the report of a checkpoint knows it, in the ledger."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import InputError
from pipeline.export.export import export_folder
from pipeline.export.record import ExportRecord
from pipeline.export.request import ExportRequest
from tests.support.families import save_family
from validate.artefacts import Artefacts
from validate.decoder import _TextOptions
from validate.record import Ledger
from validate.report import _render_html, print_ledger
from validate.rounding import Rounding
from validate.run import ValidateRequest, validate
from validate.stages import (
    _DENSE_PRODUCT,
    _NEAR_IN_INTEGERS,
    _SAME_IN_FLOAT16,
    _SAME_IN_FLOAT32,
    _SAME_MATRIX,
    ORIGINAL,
    SKIP_FORM,
    Tolerance,
    _onnx_tolerance,
)

# ONNX Runtime's attention takes heads of whole 16s.
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in few bits and its exports for the CPU, with products of both kinds."""
    folder = tmp_path_factory.mktemp("rounding")
    source = save_family(folder / "source", "smollm", **SHAPE)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    settings: dict[str, Any] = {"windows": 8, "window_length": 64, "method": "skipcat"}
    settings |= {"calibration": str(folder / "text.txt"), "keep_params": 0.7}
    settings |= {"weights": "int4-b32-asym", "table": "int8-b64-sym"}
    compress_to_folder(CompressRequest(str(source), **settings), folder / "checkpoint")
    for products in ("float", "integer"):
        request = ExportRequest("cpu", max_length=64, products=products)
        export_folder(folder / "checkpoint", folder / f"onnx-{products}", request)
    return folder


@pytest.fixture(scope="module")
def ledger(root: Path) -> Ledger:
    exports = tuple(root / f"onnx-{products}" for products in ("float", "integer"))
    artefacts = Artefacts(str(root / "source"), root / "checkpoint", exports)
    options = _TextOptions(
        str(root / "text.txt"), windows=2, window_length=48, prompts=2, max_new_tokens=8
    )
    return validate(ValidateRequest(artefacts, options))


def test_every_stage_of_a_checkpoint_in_few_bits_is_held_to_what_it_should_equal(
    ledger: Ledger,
) -> None:
    assert [(row.name, row.reference) for row in ledger.rows] == [
        (ORIGINAL, None),
        (_DENSE_PRODUCT, ORIGINAL),
        (SKIP_FORM, _DENSE_PRODUCT),
        ("onnxruntime onnx-float", SKIP_FORM),
        ("onnxruntime onnx-integer", SKIP_FORM),
    ]
    tolerances = [row.tolerance for row in ledger.rows[1:]]
    assert tolerances == [Tolerance(), _SAME_MATRIX, _SAME_IN_FLOAT32, _NEAR_IN_INTEGERS]
    statuses = [row.verdict.status for row in ledger.rows]
    assert statuses == ["measured", "measured", "pass", "pass", "pass"]


def test_products_of_integers_are_further_from_the_checkpoint_than_those_of_floats(
    ledger: Ledger,
) -> None:
    floats, integers = (row.to_reference for row in ledger.rows[3:])
    assert floats is not None
    assert integers is not None
    assert floats.metrics.min_cosine > 0.99999 > integers.metrics.min_cosine
    agreed = ledger.rows[3].greedy_to_reference
    assert agreed is not None
    assert agreed.identical_fraction == 1


def test_the_ledger_says_what_rounding_added_to_truncation(root: Path, ledger: Ledger) -> None:
    groups = json.loads((root / "checkpoint" / "report.json").read_text())["groups"]
    found = ledger.rounding
    assert found is not None
    assert found.groups == found.all_groups == len(groups)
    assert found.tables == dict.fromkeys(("model.embed_tokens", "lm_head"), "int8-b64-sym")
    factors = sum(1 if group["form"] == "dense" else 2 for group in groups)
    assert found.formats == {"int4-b32-asym": factors}
    means = [
        sum(group[name] for group in groups) / len(groups)
        for name in ("relative_error", "rounded_relative_error")
    ]
    assert (found.truncated, found.rounded) == pytest.approx(tuple(means))
    assert found.share == pytest.approx(1 - means[0] / means[1])
    assert found.share is not None
    assert 0 < found.share < 1


def test_the_reports_print_it_and_the_json_keeps_it(ledger: Ledger) -> None:
    printed = io.StringIO()
    print_ledger(ledger, printed)
    for text in (printed.getvalue(), _render_html(ledger)):
        assert "of it, rounding" in " ".join(text.split())
        assert "int4-b32-asym" in text
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again.rounding == ledger.rounding


def test_a_checkpoint_of_numbers_has_nothing_to_say(tmp_path: Path, ledger: Ledger) -> None:
    assert Rounding.read(tmp_path) is None
    report = {"groups": [{"form": "skip", "relative_error": 0.1}], "tables": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert Rounding.read(tmp_path) is None
    printed = io.StringIO()
    print_ledger(replace(ledger, rounding=None), printed)
    assert "quantised" not in printed.getvalue()


def test_tables_alone_in_few_bits_are_named_without_errors_that_nobody_measured(
    tmp_path: Path,
) -> None:
    report = {
        "groups": [{"form": "dense", "relative_error": 0.0}],
        "tables": {"lm_head": "int8-row-sym"},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = Rounding.read(tmp_path)
    assert found == Rounding(0, 1, {}, {"lm_head": "int8-row-sym"}, None, None)
    assert found.share is None


def test_a_ledger_written_before_rounding_was_known_is_read(ledger: Ledger) -> None:
    fields = ledger.to_json()
    del fields["rounding"]
    assert Ledger.from_json(fields).rounding is None


def test_a_broken_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InputError, match="broken"):
        Rounding.read(tmp_path)


@pytest.mark.parametrize(
    ("weights", "accuracy_level", "dtype", "expected"),
    [
        ("stored", 0, "float32", _SAME_IN_FLOAT32),
        ("stored", 4, "float32", _NEAR_IN_INTEGERS),
        ("stored", None, "float32", _SAME_IN_FLOAT32),
        ("stored", None, "float16", _SAME_IN_FLOAT16),
        ("float", None, "float32", _SAME_IN_FLOAT32),
        ("int8", 4, "float32", _NEAR_IN_INTEGERS),
        ("int4", 4, "float32", Tolerance()),
        ("int4-offset", 4, "float32", Tolerance()),
    ],
)
def test_an_export_is_held_to_what_its_products_can_keep(
    weights: str, accuracy_level: int | None, dtype: str, expected: Tolerance
) -> None:
    record = ExportRecord("cpu", dtype, "", weights=weights, accuracy_level=accuracy_level)
    assert _onnx_tolerance(record) == expected


def test_an_export_whose_4_bits_round_nothing_is_held_to_what_its_products_can_keep() -> None:
    record = ExportRecord(
        "cpu", "float32", "", weights="int4-offset", accuracy_level=4, exact_weights=True
    )
    assert _onnx_tolerance(record) == _NEAR_IN_INTEGERS
