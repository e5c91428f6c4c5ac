"""What CONTRIBUTING promises: a method, a format, a runtime and a drafter are rows of tables.

Each test adds a toy one from outside, by its own module and the rows that CONTRIBUTING names,
touches nothing else of the product, and runs it. The files that a real one would touch are counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.models import save_tiny_folder
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.compress import methods
from pipeline.compress.methods import METHODS, ONE_SIDED, Method, _Allocation
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.export import contract
from pipeline.export.contract import COMPAT, PROFILES
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.quantize import formats
from pipeline.quantize.formats import RUNTIMES, Format
from pipeline.runtime import drafting
from pipeline.runtime.drafting import make_drafter
from pipeline.runtime.generate import generate
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.open_session import open_session

TOY_METHOD = '''
"""Every other layer loses half of every matrix."""

from pipeline.compress.plan.plan import RankPlan, uniform_plan


def allocate(model, budget):
    small, whole = uniform_plan(model.layers, 0.4), uniform_plan(model.layers, 1.0)
    chosen = (small, whole)
    return RankPlan(
        {layer.name: chosen[i % 2].layers[layer.name] for i, layer in enumerate(model.layers)}
    )
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("Whales sing, and people listen to them for hours. " * 200)
    return path


def request(source: Path, text: Path, **settings: object) -> CompressRequest:
    how = {"calibration": str(text), "windows": 16, "window_length": 32} | settings
    return CompressRequest(str(source), **how)  # type: ignore[arg-type]


def test_a_method_with_its_own_allocation_is_one_file_and_one_row(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_method.py").write_text(TOY_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    row = Method("half of it", True, True, _Allocation("toy", "toy_method:allocate"), ONE_SIDED)
    monkeypatch.setitem(METHODS, "toy", row)
    wanted = request(source, text, method="toy", keep_params=0.75)
    report = compress_to_folder(wanted, tmp_path / "small")
    forms = {form: {g["members"][0] for g in report["groups"] if g["form"] == form}
             for form in ("skip", "dense")}  # fmt: skip
    assert all(".0." in name for name in forms["skip"])
    assert all(".1." in name for name in forms["dense"])
    assert json.loads((tmp_path / "small" / "recipe.json").read_text())["method"] == {
        "summary": "half of it", "cat": True, "skip": True, "allocation": "toy",
        "fit": {"two_sided": False, "mix": None, "reconstruct": False, "nearest": False},
        "quantizer": False,
    }  # fmt: skip
    touched = {"toy_method.py", methods.__file__}
    assert len(touched) <= 2


def test_an_allocation_that_does_not_exist_is_an_error_and_no_other_allocation(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Method("nothing", True, True, _Allocation("none", "no_such:allocate"), ONE_SIDED)
    monkeypatch.setitem(METHODS, "none", row)
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        compress_to_folder(request(source, text, method="none"), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_format_of_the_known_kinds_is_a_row(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="bits are one of"):
        Format.parse("int5-b16-asym")
    monkeypatch.setattr(formats, "_BITS", (*formats._BITS, 5))
    wanted = request(source, text, method="rtn", weights="int5-b16-asym", runtime="any")
    report = compress_to_folder(wanted, tmp_path / "small")
    assert {group["up_style"] for group in report["groups"]} == {"int5-b16-asym"}
    weights = load_checkpoint(tmp_path / "small").get_parameter("model.norm.weight")
    assert weights.numel() == 32
    touched = {formats.__file__}
    assert len(touched) <= 5


@pytest.mark.slow
def test_a_runtime_is_rows_of_profiles_and_formats_and_a_session(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = replace(RUNTIMES["any"], name="toy", takes="everything")
    monkeypatch.setitem(RUNTIMES, "toy", toy)
    monkeypatch.setitem(PROFILES, "toy", replace(PROFILES[COMPAT], name="toy", formats_of="toy"))
    record = export_folder(source, tmp_path / "onnx", ExportRequest(profile="toy"))
    assert record["profile"] == "toy"
    session = open_session(tmp_path / "onnx")  # ONNX Runtime's own session is its session, too
    assert list(generate(session, [1, 2, 3], Decoding(4)))
    touched = {contract.__file__, formats.__file__, "toy_session.py", "open_session.py"}
    assert len(touched) <= 5


class _Parrot:
    """Proposes the last token again."""

    def __init__(self) -> None:
        self.drafted = self.taken = 0
        self.last: int | None = None

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        self.taken += sum(a == b for a, b in zip(drafted, chosen, strict=False))
        self.last = chosen[-1] if chosen else self.last

    def draft(self, most: int) -> list[int]:
        found = [] if self.last is None else [self.last] * min(most, 3)
        self.drafted += len(found)
        return found


def test_a_drafter_is_its_file_and_a_row(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_folder(source, tmp_path / "cpu", ExportRequest(profile="cpu", products="float"))
    monkeypatch.setitem(drafting._DRAFTERS, "parrot", lambda session: _Parrot())
    session = open_session(tmp_path / "cpu")
    plain = list(generate(session, [1, 2, 3], Decoding(12)))
    drafter = make_drafter(session, "parrot")
    assert drafter is not None
    session.reset()
    assert list(generate(session, [1, 2, 3], Decoding(12), drafter)) == plain
    assert drafter.drafted > 0
    touched = {"parrot.py", drafting.__file__}
    assert len(touched) <= 3
