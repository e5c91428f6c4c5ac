"""The search over ranks and bits: within its budget, and no choice that fits is better."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from pipeline.compress.plan import file_bytes as stored_bytes
from pipeline.compress.plan.file_bytes import group_bytes
from pipeline.compress.plan.plan import GroupPlan, RankPlan
from pipeline.compress.plan.quantization_costs import StackCost
from pipeline.compress.plan.rank_search import (
    BitsRequest,
    Curves,
    EmbeddingChoice,
    Members,
    QuantizationCosts,
    searched_bits,
    stacks_of,
)
from pipeline.errors import UsageError
from pipeline.model.structure import Group, Layer
from pipeline.quantize.formats import RUNTIMES, Format, Runtime

RANDOM = np.random.default_rng(0)
STYLES = ("int4-b16-asym", "int8-row-sym")
SMALL = Runtime("any", tuple(map(Format.parse, STYLES)), (), 2, 2, "two formats")
PAIR = Group(("a", "b"), 8, (8, 6))
SINGLE = Group(("c",), 12, (8,))
LAYERS = [Layer("layer", (PAIR, SINGLE))]
TABLES = [[EmbeddingChoice({}, 400, 0.0), EmbeddingChoice({"e": "int4-b16-asym"}, 110, 0.05)]]
FIXED = 50


@pytest.fixture(autouse=True)
def short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that do not outweigh matrices as small as these, whose every choice can be tried."""
    monkeypatch.setattr(stored_bytes, "_NAME_BYTES", 2)
    monkeypatch.setattr(stored_bytes, "_INDEX_BYTES", 1)


def measurements(groups: list[Group], formats: int) -> tuple[Curves, QuantizationCosts]:
    """Falling curves and rounding costs of every stack; made up, but as measured ones look."""
    curves: Curves = {}
    noises: QuantizationCosts = {}
    for group in groups:
        heights = dict(zip(group.members, group.out_features, strict=True))
        for stack in stacks_of(group, cat=True):
            full = min(sum(heights[m] for m in stack), group.in_features)
            energies = np.sort(RANDOM.exponential(0.02, full))[::-1]
            curves[stack] = np.r_[energies[::-1].cumsum()[::-1], 0.0]
            ranks = np.unique([max(1, full // 3), max(1, full - 1)])
            fall = 10.0 ** -np.arange(1, formats + 1)
            down, up = (fall * RANDOM.uniform(0.1, 0.3, (len(ranks), 1)) for _ in range(2))
            noises[stack] = StackCost(fall * RANDOM.uniform(0.2, 0.5), ranks, down, up)
    return curves, noises


CURVES, NOISES = measurements([PAIR, SINGLE], len(STYLES))


def searched(budget: int, runtime: Runtime = SMALL) -> RankPlan:
    request = BitsRequest(budget, FIXED, runtime)
    return searched_bits(LAYERS, CURVES, NOISES, TABLES, request)[0]


def size_and_loss(plan: RankPlan) -> tuple[int, float]:
    table = TABLES[0][1 if plan.embeddings else 0]
    size = sum(group_bytes(group, SMALL) for group in plan.groups)
    loss = sum(group.expected_kl or 0.0 for group in plan.groups)
    return size + table.stored_bytes + FIXED, loss + table.loss


def every_way(group: Group, members: Members) -> list[tuple[int, float]]:
    """Size and loss of each way to store one stack, by the definitions."""
    heights = dict(zip(group.members, group.out_features, strict=True))
    rows, columns = sum(heights[m] for m in members), group.in_features
    full, noise = min(rows, columns), NOISES[members]
    found = []
    for place, style in enumerate((None, *STYLES)):
        plan = GroupPlan(members, rows, columns, "dense", full, up_format=style)
        found.append((group_bytes(plan, SMALL), 0.0 if place == 0 else noise.dense[place - 1]))
    for rank, d, u in itertools.product(range(1, full), range(3), range(3)):
        down, up = noise.at(np.array([rank]))
        styles = [(None, *STYLES)[place] for place in (d, u)]
        plan = GroupPlan(members, rows, columns, "skip", rank, None, None, *styles)
        loss = CURVES[members][rank]
        loss += (down[0, d - 1] if d else 0) + (up[0, u - 1] if u else 0)
        found.append((group_bytes(plan, SMALL), float(loss)))
    return found


def least_loss(budget: int) -> float:
    """By trying everything: every partition, form, rank and pair of formats."""
    pair = every_way(PAIR, ("a", "b")) + [
        (s + t, x + y)
        for (s, x), (t, y) in itertools.product(every_way(PAIR, ("a",)), every_way(PAIR, ("b",)))
    ]
    sizes, losses = (np.array(column) for column in zip(*sorted(pair), strict=True))
    best = np.minimum.accumulate(losses)
    least = np.inf
    for table, (size, loss) in itertools.product(TABLES[0], every_way(SINGLE, ("c",))):
        left = budget - FIXED - table.stored_bytes - size
        place = np.searchsorted(sizes, left, side="right") - 1
        if place >= 0:
            least = min(least, best[place] + loss + table.loss)
    return float(least)


@pytest.mark.parametrize("budget", [320, 350, 400, 450, 500, 600, 700, 800, 900, 1000])
def test_the_plan_is_within_the_budget_and_as_good_as_trying_everything(budget: int) -> None:
    size, loss = size_and_loss(searched(budget))
    assert size <= budget
    assert loss == pytest.approx(least_loss(budget), rel=1e-3, abs=1e-9)


def test_a_larger_budget_never_loses_more() -> None:
    losses = [size_and_loss(searched(budget))[1] for budget in range(320, 1000, 40)]
    assert all(b <= a * (1 + 1e-3) for a, b in itertools.pairwise(losses))


def test_where_all_fits_nothing_changes() -> None:
    plan = searched(1_000_000)
    assert all(group.is_unchanged for group in plan.groups)
    assert plan.embeddings == {}
    assert size_and_loss(plan)[1] == 0


def test_a_budget_that_nothing_fits_is_refused_with_one_that_works() -> None:
    with pytest.raises(UsageError, match="No plan is so small") as caught:
        searched(200)
    found = re.search(r"at least ([\d.]+) MB", caught.value.details["expected"])
    assert found
    enough = round(float(found[1]) * 1e6)
    assert size_and_loss(searched(enough))[0] <= enough


def test_ranks_are_the_multiples_that_are_asked_for() -> None:
    request = BitsRequest(450, FIXED, SMALL, multiple=3)
    plan, _ = searched_bits(LAYERS, CURVES, NOISES, TABLES, request)
    factored = [group for group in plan.groups if group.form != "dense"]
    assert factored
    assert all(group.rank % 3 == 0 for group in factored)


WIDE = [Layer("layer", (Group(("w",), 512, (384,)), Group(("o",), 200, (320,))))]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.15, 0.2, 0.3])
def test_tensorrt_is_given_whole_blocks_only(share: float, skip: bool) -> None:
    runtime = RUNTIMES["tensorrt"]
    curves, noises = measurements(list(WIDE[0].groups), len(runtime.formats))
    # Int4 costs least here, so that it is taken wherever it is allowed.
    noises = {
        m: replace(n, dense=n.dense[::-1], down=n.down[:, ::-1], up=n.up[:, ::-1])
        for m, n in noises.items()
    }
    whole = 2 * (512 * 384 + 200 * 320)
    request = BitsRequest(int(share * whole), 0, runtime, skip=skip)
    plan, _ = searched_bits(WIDE, curves, noises, [], request)
    for group in plan.groups:
        width = group.columns - group.rank if skip else group.columns
        matrices = (
            [(group.up_format, group.columns)]
            if group.form == "dense"
            else [(group.down_format, width), (group.up_format, group.rank)]
        )
        for style, columns in matrices:
            assert style is None or runtime.accepts(Format.parse(style), columns)
    styles = {style for g in plan.groups for style in (g.down_format, g.up_format)}
    assert styles & {"int4-b64-sym", "int4-b128-sym"}
