from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.errors import InputError, UsageError
from tests.support.ledger_stages import ORIGINAL as TINY
from tests.support.ledger_stages import run
from tests.support.tiny_decoder import (
    MAX_LENGTH,
    save_tiny_folder,
    shared_export,
    shared_rounded_export,
    write_record,
)
from validate.artefacts import Artefacts
from validate.decoder import DECODER, _TextOptions
from validate.stages import (
    _CACHE_IN_PIECES,
    _DENSE_PRODUCT,
    _ROUNDED,
    _ROUNDED_LATENTS,
    _SAME_BITS,
    _SAME_BUT_FOR_TIES,
    _SAME_IN_CODES,
    _SAME_IN_FLOAT16,
    _SAME_IN_FLOAT32,
    _SAME_MATRIX,
    CACHE_CUT,
    CACHE_FULL,
    CACHE_LATENT,
    ORIGINAL,
    SKIP_FORM,
    Tolerance,
    standard_stages,
)


def half_export(folder: Path) -> Path:
    """A folder that says it is float16; its graph is never opened here."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    write_record(folder, "opset24", dtype="float16")
    return folder


def test_every_stage_has_its_reference_and_its_tolerance(tmp_path: Path) -> None:
    half = half_export(tmp_path / "onnx-fp16")
    artefacts = Artefacts("name", tmp_path, (shared_export("compat"), half), (tmp_path / "engine",))
    stages = standard_stages(artefacts, DECODER.openers, TINY.open)
    assert [(stage.name, stage.reference, stage.tolerance) for stage in stages[1:]] == [
        (_DENSE_PRODUCT, ORIGINAL, TINY.tolerance),
        (SKIP_FORM, _DENSE_PRODUCT, _SAME_MATRIX),
        ("onnxruntime compat", SKIP_FORM, _SAME_IN_FLOAT32),
        ("onnxruntime onnx-fp16", SKIP_FORM, _SAME_IN_FLOAT16),
        ("tensorrt engine", SKIP_FORM, _SAME_IN_FLOAT16),
    ]
    assert [stage.required for stage in stages] == [True] * 5 + [False]


def test_without_a_checkpoint_exports_are_held_against_the_original() -> None:
    artefacts = Artefacts("name", onnx=(shared_export("compat"),))
    stages = standard_stages(artefacts, DECODER.openers, TINY.open)
    assert [stage.reference for stage in stages] == [None, ORIGINAL]


def test_a_cache_of_codes_has_a_stage_of_its_own_which_the_export_equals() -> None:
    folder = shared_rounded_export()
    artefacts = Artefacts(str(folder.parent / "model"), onnx=(folder,))
    _, rounded, export = standard_stages(artefacts, DECODER.openers, TINY.open)
    assert (rounded.name, rounded.reference) == ("cache int8, cpu8", ORIGINAL)
    assert (export.reference, export.tolerance) == (rounded.name, _SAME_IN_CODES)
    ledger = run(TINY, rounded, export)
    # What codes cost a random model says little; the export has the very same ones.
    assert ledger.rows[2].verdict.reasons == []
    compared = [row.to_reference for row in ledger.rows[1:] if row.to_reference is not None]
    kl = [row.metrics.kl_mean for row in compared]
    assert kl[1] < kl[0] / 4


@pytest.mark.parametrize("bits", [pytest.param(None, marks=pytest.mark.slow), 8])
def test_a_smaller_cache_is_measured_cut_rounded_latent_and_in_pieces(
    bits: int | None, tmp_path: Path
) -> None:
    checkpoint, model = tmp_path / "small", tmp_path / "model"
    save_tiny_folder(model)
    options = ["--keep-params", "1", "--windows", "8", "--window-length", "32"]
    own = ["--cache-form", "narrow", "--cache-bits", str(bits or "float"), "--keep-cache", "0.7"]
    assert main(["compress", "-m", str(model), "-o", str(checkpoint), *options, *own]) == 0
    stages = standard_stages(Artefacts("x", checkpoint), DECODER.openers, TINY.open)
    found = {stage.name: (stage.reference, stage.tolerance) for stage in stages[3:]}
    rounding = {CACHE_CUT: (SKIP_FORM, Tolerance())} if bits else {}
    full = (CACHE_CUT, _ROUNDED_LATENTS) if bits else (SKIP_FORM, Tolerance())
    same = _SAME_IN_CODES if bits else _SAME_MATRIX
    assert found == rounding | {
        CACHE_FULL: full,
        CACHE_LATENT: (CACHE_FULL, _SAME_MATRIX),
        _CACHE_IN_PIECES: (CACHE_LATENT, same),
    }
    rows = run(*stages).rows
    assert [row.verdict.reasons for row in rows] == [[]] * len(stages)
    cost = {row.name: row.to_reference for row in rows}
    if bits:
        rounded = cost[CACHE_FULL]
        assert rounded is not None
        assert rounded.metrics.kl_mean > 0


@pytest.mark.parametrize(("left", "near"), [({}, _SAME_BITS), ({"x": "why"}, _SAME_BUT_FOR_TIES)])
def test_rounded_convolutions_have_one_form_and_their_exports_its_bits(
    tmp_path: Path, left: dict[str, str], near: Tolerance
) -> None:
    report = {"convolutions": {"stem": {"rounded": True, "macs": 1}}, "left_out": left}
    (tmp_path / "report.json").write_text(json.dumps(report))
    openers = replace(DECODER.openers, unoptimised=DECODER.openers.onnx)
    artefacts = Artefacts(
        "name", tmp_path, (shared_export("compat"),), (tmp_path / "engine",), (tmp_path / "ptq",)
    )
    stages = standard_stages(artefacts, openers, TINY.open)
    assert [(stage.name, stage.reference, stage.tolerance) for stage in stages[1:]] == [
        ("checkpoint ptq", ORIGINAL, Tolerance()),
        (_ROUNDED, ORIGINAL, Tolerance()),
        ("onnxruntime compat, not optimised", _ROUNDED, near),
        ("onnxruntime compat", _ROUNDED, _SAME_BUT_FOR_TIES),
        ("tensorrt engine", _ROUNDED, _SAME_BUT_FOR_TIES),
    ]


def test_a_limit_on_kl_holds_for_every_stage_but_the_original(tmp_path: Path) -> None:
    artefacts = Artefacts("name", tmp_path)
    stages = standard_stages(artefacts, DECODER.openers, TINY.open, max_kl=0.5)
    assert [stage.tolerance.max_kl for stage in stages] == [None, 0.5, 0.5]
    assert stages[2].tolerance.min_cosine == _SAME_MATRIX.min_cosine


def test_folders_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    engines = (tmp_path / "a" / "engine", tmp_path / "b" / "engine")
    stages = standard_stages(Artefacts("x", engines=engines), DECODER.openers, TINY.open)
    names = [stage.name for stage in stages]
    assert len(set(names)) == 3


def test_a_build_folder_is_read_whole(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "recipe.json").write_text(json.dumps({"model": "the-original"}))
    half_export(tmp_path / "onnx-fp16")
    half_export(tmp_path / "onnx")
    (tmp_path / "engine-sm86").mkdir()
    (tmp_path / "engine-sm86" / "manifest.json").write_text("{}")
    assert Artefacts.find(tmp_path) == Artefacts(
        "the-original",
        tmp_path / "checkpoint",
        (tmp_path / "onnx", tmp_path / "onnx-fp16"),
        (tmp_path / "engine-sm86",),
    )


def test_an_incomplete_build_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a build folder"):
        Artefacts.find(tmp_path)
    save_tiny_folder(tmp_path / "checkpoint")
    with pytest.raises(InputError, match="--original"):
        Artefacts.find(tmp_path)
    (tmp_path / "checkpoint" / "recipe.json").write_text(json.dumps({"model": "the-original"}))
    (tmp_path / "onnx").mkdir()
    with pytest.raises(InputError, match=r"export\.json"):
        Artefacts.find(tmp_path)


def test_inputs_longer_than_a_cache_are_refused_before_anything_runs() -> None:
    artefacts = Artefacts("name", onnx=(shared_export("compat"),))
    _TextOptions(window_length=MAX_LENGTH).check(artefacts)
    with pytest.raises(UsageError, match="--window-length"):
        _TextOptions(window_length=MAX_LENGTH + 1).check(artefacts)
