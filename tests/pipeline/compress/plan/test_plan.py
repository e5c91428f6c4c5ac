"""Plans: uniform, written, edited, read back, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.compress.plan.plan import GroupPlan, RankPlan, uniform_plan
from pipeline.errors import InputError, UsageError
from pipeline.model.structure import Layer, decoder_structure
from tests.support.families import tiny_model


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return decoder_structure(tiny_model("llama"))


def edited(path: Path, **changes: object) -> Path:
    """The plan with fields of its first group changed."""
    plan = json.loads(path.read_text())
    next(iter(plan["layers"].values()))[0].update(changes)
    path.write_text(json.dumps(plan))
    return path


def test_a_saved_plan_reads_back_the_same(layers: list[Layer], tmp_path: Path) -> None:
    plan = uniform_plan(layers, 0.7)
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json", layers) == plan


def test_cat_stacks_what_shares_an_input_and_no_cat_does_not(layers: list[Layer]) -> None:
    stacked = uniform_plan(layers, 0.7, cat=True).groups
    single = uniform_plan(layers, 0.7, cat=False).groups
    assert sorted(len(group.members) for group in stacked) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert {len(group.members) for group in single} == {1}
    assert sum(g.dense_parameters for g in stacked) == sum(g.dense_parameters for g in single)


def test_an_edited_rank_is_followed(layers: list[Layer], tmp_path: Path) -> None:
    uniform_plan(layers, 0.7).save(tmp_path / "plan.json")
    plan = RankPlan.load(edited(tmp_path / "plan.json", rank=3), layers)
    assert plan.groups[0].rank == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "impossible size"),
        ({"rank": 10_000}, "impossible size"),
        ({"members": ["model.layers.9.nothing"]}, "another model"),
        ({"form": "diagonal"}, "cannot be read"),
    ],
)
def test_an_impossible_plan_is_refused(
    layers: list[Layer], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    uniform_plan(layers, 0.7).save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=message):
        RankPlan.load(edited(tmp_path / "plan.json", **changes), layers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 3.9), ("rank", True), ("rank", "12"), ("rank", float("inf")), ("rank", None),
        ("rows", "8"), ("columns", 1e3), ("members", "q"), ("members", [5]), ("form", 5),
        ("reason", 5), ("expected_kl", "little"), ("up_style", 4), ("up_style", "int4"),
        ("up_style", "int4-b999999999-sym"), ("up_stlye", "int4-b32-sym"),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_refused_with_its_group(
    layers: list[Layer], tmp_path: Path, field: str, value: object
) -> None:
    uniform_plan(layers, 0.7).save(tmp_path / "plan.json")
    with pytest.raises(InputError) as caught:
        RankPlan.load(edited(tmp_path / "plan.json", **{field: value}), layers)
    assert field in str(caught.value)
    assert f"{layers[0].name}, group 1" in str(caught.value)


def test_stacking_matrices_with_different_inputs_is_refused(
    layers: list[Layer], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    uniform_plan(layers, 0.7).save(path)
    plan = json.loads(path.read_text())
    groups = next(iter(plan["layers"].values()))
    groups[0]["members"] += groups[1]["members"]
    groups[0]["rows"] += groups[1]["rows"]
    del groups[1]
    path.write_text(json.dumps(plan))
    with pytest.raises(InputError, match="do not share an input"):
        RankPlan.load(path, layers)


TABLE, HEAD, INT8, INT6 = "model.embed_tokens", "lm_head", "int8-b32-sym", "int6-b32-sym"


@pytest.mark.parametrize(
    ("tables", "names", "said"),
    [
        ({"model.nowhere": INT8}, ((TABLE,), (HEAD,)), ("model.nowhere", f"{TABLE}, {HEAD}")),
        ({TABLE: INT8}, (), (TABLE, "none")),
        ({HEAD: INT8}, ((TABLE, HEAD),), ("as it is", "share their matrix")),
        ({TABLE: INT8, HEAD: INT6}, ((TABLE, HEAD),), (INT6, "share their matrix")),
    ],
)
def test_tables_that_the_model_has_not_are_refused_and_two_formats_of_one_matrix(
    layers: list[Layer],
    tmp_path: Path,
    tables: dict[str, str],
    names: tuple[tuple[str, ...], ...],
    said: tuple[str, str],
) -> None:
    path = tmp_path / "plan.json"
    plan = replace(uniform_plan(layers, 0.7), embeddings=tables)
    plan.save(path)
    with pytest.raises(InputError, match="The rank plan") as caught:
        RankPlan.load(path, layers, names)
    assert caught.value.details["where"] == f"{path}: tables"
    for words in said:
        assert words in str(caught.value)
    fitting = tuple((name,) for name in tables)
    assert RankPlan.load(path, layers, fitting) == plan


@pytest.mark.parametrize("kept", [0.0, -1.0, 1.5])
def test_a_kept_fraction_outside_the_range_is_refused(layers: list[Layer], kept: float) -> None:
    with pytest.raises(UsageError, match="out of range"):
        uniform_plan(layers, kept)


def test_a_file_that_is_no_plan_is_refused(layers: list[Layer], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        RankPlan.load(tmp_path / "plan.json", layers)


def test_formats_are_written_under_the_names_that_earlier_plans_have() -> None:
    group = GroupPlan(("q",), 4, 8, "skip", 2, None, 0.1, "int4-b16-asym", "int8-row-sym")
    written = group.to_json()
    assert (written["down_style"], written["up_style"]) == ("int4-b16-asym", "int8-row-sym")
    assert not {"down_format", "up_format"} & set(written)
