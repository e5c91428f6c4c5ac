"""The plan that costs the model least: every way to store every group, under one budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.compress.forms import Form, stored_parameters
from pipeline.compress.plan.knapsack import allocate, undominated
from pipeline.compress.plan.plan import (
    Curves,
    GroupPlan,
    Measured,
    Members,
    RankBudget,
    RankPlan,
)
from pipeline.errors import UsageError
from pipeline.model.structure import Group, Layer

_RANKS_PER_STACK = 72
# Matrix units work on tiles of this many; a grid that is coarser than half of it is made of them.
_TILE = 8
CANDIDATES_PER_GROUP = 400


@dataclass(frozen=True)
class Candidate:
    """One way to store one group of matrices that share an input.

    Attributes:
        stacks: what becomes of its members, each in exactly one of them.
        size: numbers stored.
        loss: what it is expected to cost, nats.
    """

    stacks: tuple[GroupPlan, ...]
    size: int
    loss: float


def allocate_by_cost(model: Measured, budget: RankBudget) -> RankPlan:
    """The plan that is expected to cost least: ranks and sharing of the whole model at once.

    Raises:
        UsageError: no plan is small enough.
    """
    return searched_plan(
        model.layers,
        model.curves,
        budget.kept,
        cat=budget.cat,
        skip=budget.skip,
        multiple=budget.multiple,
    )


def searched_plan(
    layers: list[Layer],
    curves: Curves,
    kept: float,
    *,
    cat: bool = True,
    skip: bool = True,
    multiple: int = 1,
) -> RankPlan:
    """Choose ranks, and which matrices share their right factor, for the whole model at once.

    Args:
        layers: the decoder's structure.
        curves: of every stack that `stacks_of` names.
        kept: fraction of the decoder's linear parameters to keep, in (0, 1].
        cat: matrices that share an input may share their right factor, where that pays.
        skip: factors are stored in block-skip form.
        multiple: ranks are multiples of this.

    Raises:
        UsageError: no plan is small enough; says what the smallest one keeps.
    """
    groups = [(layer.name, group) for layer in layers for group in layer.groups]
    candidates = [
        _group_candidates(g, curves, cat=cat, skip=skip, multiple=multiple) for _, g in groups
    ]
    dense = sum(sum(group.out_features) * group.in_features for _, group in groups)
    budget = math.floor(kept * dense * (1 + 1e-12))  # 0.145 x 200 is 29, not 28.999999999999996
    sizes = [np.array([c.size for c in options]) for options in candidates]
    losses = [np.array([c.loss for c in options]) for options in candidates]
    smallest = sum(int(s.min()) for s in sizes)
    if smallest > budget:
        raise UsageError(
            "No plan keeps so little.",
            observed=f"{kept:.4f} of the decoder's linear parameters",
            expected=f"at least {math.ceil(1e4 * smallest / dense) / 1e4:.4f} for this model",
        )
    planned: dict[str, tuple[GroupPlan, ...]] = {layer.name: () for layer in layers}
    chosen = allocate(sizes, losses, budget)
    for (layer_name, _), options, index in zip(groups, candidates, chosen, strict=True):
        planned[layer_name] += options[index].stacks
    return RankPlan(planned)


def stacks_of(group: Group, *, cat: bool) -> list[Members]:
    """Every stack of members that some candidate holds."""
    stacks = (stack for partition in partitions(group.members, cat=cat) for stack in partition)
    return list(dict.fromkeys(stacks))


def partitions(members: Members, *, cat: bool) -> Iterator[tuple[Members, ...]]:
    """Ways to divide the members into stacks: all of them for up to three members.

    Beyond three their number explodes: then all together, and each alone.
    """
    alone = tuple((member,) for member in members)
    if not cat or len(members) == 1:
        yield alone
        return
    yield (members,)
    yield alone
    if len(members) == 3:
        for single in members:
            yield (tuple(m for m in members if m != single), (single,))


def _group_candidates(
    group: Group, curves: Curves, *, cat: bool, skip: bool, multiple: int
) -> list[Candidate]:
    """The candidates of one group that no other beats, smallest first."""
    heights = dict(zip(group.members, group.out_features, strict=True))
    found: list[Candidate] = []
    for partition in partitions(group.members, cat=cat):
        stacks = [
            _stack_candidates(
                stack,
                sum(heights[m] for m in stack),
                group.in_features,
                curves[stack],
                form="skip" if skip else "low_rank",
                multiple=multiple,
            )
            for stack in partition
        ]
        found += combined(stacks)
    return thinned(front_of(found), CANDIDATES_PER_GROUP)


def rank_step(full: int, multiple: int) -> int:
    """Distance between the ranks that are considered: about RANKS_PER_STACK up to the full rank."""
    step = multiple * math.ceil(full / _RANKS_PER_STACK / multiple)
    tiled = math.lcm(multiple, _TILE)
    return tiled * math.ceil(step / tiled) if 2 * step > tiled else step


def _stack_candidates(
    members: Members, rows: int, columns: int, curve: np.ndarray, *, form: Form, multiple: int
) -> list[Candidate]:
    """Dense, and factored at those ranks of a grid that save something."""
    full = min(rows, columns)
    dense = GroupPlan(members, rows, columns, "dense", full, "it is worth its size", 0.0)
    found = [Candidate((dense,), rows * columns, 0.0)]
    step = rank_step(full, multiple)
    for rank in range(step, full, step):
        size = stored_parameters(form, rows, columns, rank)
        if size < rows * columns:
            loss = float(curve[rank])
            plan = GroupPlan(members, rows, columns, form, rank, None, loss)
            found.append(Candidate((plan,), size, loss))
    return front_of(found)


def combined(stacks: list[list[Candidate]]) -> list[Candidate]:
    """One candidate from each stack, in every way that no other beats."""
    joined = stacks[0]
    for options in stacks[1:]:
        # Only the survivors become objects: there are thousands of pairs for each of them.
        sizes = np.add.outer([c.size for c in joined], [c.size for c in options])
        losses = np.add.outer([c.loss for c in joined], [c.loss for c in options])
        best = undominated(sizes.ravel(), losses.ravel())
        pairs = [(joined[i // len(options)], options[i % len(options)]) for i in best]
        joined = [
            Candidate(a.stacks + b.stacks, a.size + b.size, a.loss + b.loss) for a, b in pairs
        ]
    return joined


def front_of(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in both size and loss, by rising size."""
    sizes = np.array([c.size for c in candidates])
    losses = np.array([c.loss for c in candidates])
    return [candidates[i] for i in undominated(sizes, losses)]


def thinned(candidates: list[Candidate], largest: int) -> list[Candidate]:
    """Evenly chosen ones, both ends among them, when there are too many for the solver."""
    if len(candidates) <= largest:
        return candidates
    places = np.linspace(0, len(candidates) - 1, largest).round().astype(int)
    return [candidates[i] for i in np.unique(places)]
