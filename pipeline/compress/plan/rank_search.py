"""The plan that costs the model least: every way to store every group, under one budget.

Of numbers: each group dense, or factored at the ranks of a grid. Of bytes (MLoRQ): for every stack
of matrices dense in each format, and factored at every rank of a grid with each pair of formats for
its factors. Ways that another beats in size and expected KL are dropped; then one choice for each
group, and for the embedding and the head, by one integer program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.compress.factorize.factors import Form
from pipeline.compress.plan.file_bytes import group_bytes, matrix_bytes
from pipeline.compress.plan.knapsack import allocate, undominated
from pipeline.compress.plan.plan import (
    Curves,
    EmbeddingChoice,
    GroupPlan,
    Measured,
    Members,
    RankBudget,
    RankPlan,
)
from pipeline.compress.plan.quantization_costs import QuantizationCosts, StackCost
from pipeline.errors import UsageError
from pipeline.model.structure import Group, Layer
from pipeline.progress import note
from pipeline.quantize.formats import Format, Runtime

_RANKS_PER_STACK = 72
# Matrix units work on tiles of this many; a grid that is coarser than half of it is made of them.
_TILE = 8
_CANDIDATES_PER_GROUP = 400


@dataclass(frozen=True)
class _Candidate:
    """One way to store one group of matrices that share an input.

    Attributes:
        stacks: what becomes of its members, each in exactly one of them.
        size: numbers stored, or bytes in a search of bits.
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
    groups = [group for layer in layers for group in layer.groups]
    candidates = [
        _group_candidates(group, curves, cat=cat, skip=skip, multiple=multiple) for group in groups
    ]
    dense = sum(sum(group.out_features) * group.in_features for group in groups)
    budget = math.floor(kept * dense * (1 + 1e-12))  # 0.145 x 200 is 29, not 28.999999999999996
    smallest = sum(min(c.size for c in options) for options in candidates)
    if smallest > budget:
        raise UsageError(
            "No plan keeps so little.",
            observed=f"{kept:.4f} of the decoder's linear parameters",
            expected=f"at least {math.ceil(1e4 * smallest / dense) / 1e4:.4f} for this model",
        )
    return RankPlan(_chosen(layers, candidates, allocate(*_measures(candidates), budget, note)))


def _measures(options: Sequence[Sequence[_Candidate]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sizes and losses of the candidates of every group."""
    sizes = [np.array([c.size for c in candidates]) for candidates in options]
    return sizes, [np.array([c.loss for c in candidates]) for candidates in options]


def _chosen(
    layers: list[Layer], options: Sequence[Sequence[_Candidate]], places: Sequence[int]
) -> dict[str, tuple[GroupPlan, ...]]:
    """The candidate at its place of every group, layer by layer."""
    stacks = iter(candidates[i].stacks for candidates, i in zip(options, places, strict=True))
    return {
        layer.name: tuple(plan for _ in layer.groups for plan in next(stacks)) for layer in layers
    }


def stacks_of(group: Group, *, cat: bool) -> list[Members]:
    """Every stack of members that some candidate holds."""
    stacks = (stack for partition in _partitions(group.members, cat=cat) for stack in partition)
    return list(dict.fromkeys(stacks))


def _partitions(members: Members, *, cat: bool) -> Iterator[tuple[Members, ...]]:
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
) -> list[_Candidate]:
    """The candidates of one group, of numbers."""
    form: Form = "skip" if skip else "low_rank"

    def of_stack(stack: Members, shape: tuple[int, int]) -> list[_Candidate]:
        return _stack_candidates(stack, *shape, curves[stack], form=form, multiple=multiple)

    return _candidates_of(group, cat, of_stack)


def _candidates_of(
    group: Group, cat: bool, of_stack: Callable[[Members, tuple[int, int]], list[_Candidate]]
) -> list[_Candidate]:
    """The candidates of one group, given those of a stack, that no other beats, smallest first."""
    heights = group.heights
    found: list[_Candidate] = []
    known: dict[Members, list[_Candidate]] = {}
    for partition in _partitions(group.members, cat=cat):
        for stack in partition:
            if stack not in known:
                known[stack] = of_stack(stack, (sum(heights[m] for m in stack), group.in_features))
        found += _combined([known[stack] for stack in partition])
    return _thinned(_front_of(found), _CANDIDATES_PER_GROUP)


def _rank_step(full: int, multiple: int) -> int:
    """Distance between the ranks that are considered: about RANKS_PER_STACK up to the full rank."""
    step = multiple * math.ceil(full / _RANKS_PER_STACK / multiple)
    tiled = math.lcm(multiple, _TILE)
    return tiled * math.ceil(step / tiled) if 2 * step > tiled else step


def _stack_candidates(
    members: Members, rows: int, columns: int, curve: np.ndarray, *, form: Form, multiple: int
) -> list[_Candidate]:
    """Dense, and factored at those ranks of a grid that save something."""
    full = min(rows, columns)
    dense = GroupPlan(members, rows, columns, "dense", full, "it is worth its size", 0.0)
    found = [_Candidate((dense,), rows * columns, 0.0)]
    step = _rank_step(full, multiple)
    for rank in range(step, full, step):
        loss = float(curve[rank])
        plan = GroupPlan(members, rows, columns, form, rank, None, loss)
        if plan.kept_parameters < plan.dense_parameters:
            found.append(_Candidate((plan,), plan.kept_parameters, loss))
    return _front_of(found)


def _combined(stacks: list[list[_Candidate]]) -> list[_Candidate]:
    """One candidate from each stack, in every way that no other beats."""
    joined = stacks[0]
    for options in stacks[1:]:
        # Only the survivors become objects: there are thousands of pairs for each of them.
        sizes = np.add.outer([c.size for c in joined], [c.size for c in options])
        losses = np.add.outer([c.loss for c in joined], [c.loss for c in options])
        best = undominated(sizes.ravel(), losses.ravel())
        pairs = [(joined[i // len(options)], options[i % len(options)]) for i in best]
        joined = [
            _Candidate(a.stacks + b.stacks, a.size + b.size, a.loss + b.loss) for a, b in pairs
        ]
    return joined


def _front_of(candidates: list[_Candidate]) -> list[_Candidate]:
    """The candidates that no other beats in both size and loss, by rising size."""
    sizes = np.array([c.size for c in candidates])
    losses = np.array([c.loss for c in candidates])
    return [candidates[i] for i in undominated(sizes, losses)]


def _thinned(candidates: list[_Candidate], largest: int) -> list[_Candidate]:
    """Evenly chosen ones, both ends among them, when there are too many for the solver."""
    if len(candidates) <= largest:
        return candidates
    places = np.linspace(0, len(candidates) - 1, largest).round().astype(int)
    return [candidates[i] for i in np.unique(places)]


# In a search of bits, pairs of these are formed where matrices share an input.
_CANDIDATES_PER_STACK = 150
# More bytes than any matrix has: of a factor that the runtime does not take.
_REFUSED = 1 << 60


@dataclass(frozen=True)
class BitsRequest:
    """What a search over ranks and bits may choose from.

    Attributes:
        budget_bytes: of all weights.
        fixed_bytes: of them, those that nothing is chosen for: norms, biases, tables that stay.
        runtime: formats, and what they take in its file.
        cat: matrices that share an input may share their right factor.
        skip: factors are stored in block-skip form.
        multiple: ranks are multiples of this.
    """

    budget_bytes: int
    fixed_bytes: int
    runtime: Runtime
    cat: bool = True
    skip: bool = True
    multiple: int = 1


def searched_bits(
    layers: list[Layer],
    curves: Curves,
    costs: QuantizationCosts,
    tables: Sequence[Sequence[EmbeddingChoice]],
    request: BitsRequest,
    beside: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> tuple[RankPlan, list[int]]:
    """Choose forms, ranks and formats for the whole model at once.

    Args:
        layers: the model's structure.
        curves: what truncation costs each stack that `stacks_of` names.
        costs: what rounding costs it.
        tables: the choices of every embedding and head.
        request: budget and formats.
        beside: sizes in bytes, int [K], and losses, of choices that share the budget.

    Returns:
        The plan, and the places of the choices beside it.

    Raises:
        UsageError: no plan is small enough; says how large the smallest is.
    """
    groups = [group for layer in layers for group in layer.groups]

    def of_stack(stack: Members, shape: tuple[int, int]) -> list[_Candidate]:
        every = _bit_stack_candidates(stack, shape, curves[stack], costs[stack], request)
        return _thinned(every, _CANDIDATES_PER_STACK)

    options = [_candidates_of(group, request.cat, of_stack) for group in groups]
    sizes, losses = _measures(options)
    sizes += [np.array([c.stored_bytes for c in choices]) for choices in tables]
    losses += [np.array([c.loss for c in choices]) for choices in tables]
    sizes += [own for own, _ in beside]
    losses += [own for _, own in beside]
    left = request.budget_bytes - request.fixed_bytes
    smallest = sum(int(s.min()) for s in sizes)
    if smallest > left:
        raise UsageError(
            "No plan is so small.",
            observed=f"{request.budget_bytes / 1e6:.2f} MB",
            expected=f"at least {(smallest + request.fixed_bytes + 5000) / 1e6:.2f} MB, the "
            f"smallest choice everywhere in formats of {request.runtime.name}",
        )
    places = allocate(sizes, losses, left, note)
    others = len(groups) + len(tables)
    named: dict[str, str] = {}
    for choices, index in zip(tables, places[len(groups) : others], strict=True):
        named |= choices[index].embeddings
    return RankPlan(_chosen(layers, options, places[: len(groups)]), named), places[others:]


def _bit_stack_candidates(
    members: Members,
    shape: tuple[int, int],
    curve: np.ndarray,
    cost: StackCost,
    request: BitsRequest,
) -> list[_Candidate]:
    """Dense in every format, and the best factored forms of every rank."""
    rows, columns = shape
    full = min(rows, columns)
    formats = (None, *request.runtime.formats)
    make = partial(_candidate, request.runtime, members, shape)
    found = [
        make("dense", full, None, format, loss)
        for format, loss in zip(formats, (0.0, *cost.dense), strict=True)
        if format is None or request.runtime.accepts(format, columns)
    ]
    ranks = _ranks(full, request)
    if not len(ranks):
        return _front_of(found)
    form: Form = "skip" if request.skip else "low_rank"
    down, up = (np.pad(table, ((0, 0), (1, 0))) for table in cost.at(ranks))
    losses = curve[ranks][:, None, None] + down[:, :, None] + up[:, None, :]
    sizes = _factored_bytes(shape, ranks, formats, form, request.runtime)
    losses = np.where(sizes < _REFUSED, losses, np.inf)
    for place in undominated(sizes.ravel(), losses.ravel()):
        i, d, u = np.unravel_index(place, losses.shape)
        found.append(make(form, int(ranks[i]), formats[d], formats[u], float(losses[i, d, u])))
    return _front_of(found)


def _ranks(full: int, request: BitsRequest) -> np.ndarray:
    """A grid, and where the runtime takes whole blocks only also the ranks that are some."""
    step = _rank_step(full, request.multiple)
    ranks = np.arange(step, full, step)
    widths = [format.block for format in request.runtime.formats if format.block]
    if not widths or not request.runtime.whole_blocks:
        return ranks
    whole = math.lcm(request.multiple, min(widths))
    return np.union1d(ranks, np.arange(whole, full, whole))


def _factored_bytes(
    shape: tuple[int, int],
    ranks: np.ndarray,
    formats: Sequence[Format | None],
    form: Form,
    runtime: Runtime,
) -> np.ndarray:
    """Bytes at every rank with every pair of formats, but for indices, [ranks, s, s].

    REFUSED or more where the runtime does not take a factor.
    """
    rows, columns = shape
    widths = columns - ranks if form == "skip" else np.full_like(ranks, columns)
    down, up = (
        np.array([[_taken_bytes(m, n, format, runtime) for format in formats] for m, n in sizes])
        for sizes in (zip(ranks, widths, strict=True), ((rows, rank) for rank in ranks))
    )
    return down[:, :, None] + up[:, None, :]


def _taken_bytes(rows: int, columns: int, format: Format | None, runtime: Runtime) -> int:
    """Bytes of a factor, or REFUSED."""
    if format is not None and not runtime.accepts(format, columns):
        return _REFUSED
    return matrix_bytes(rows, columns, format, runtime)


def _candidate(
    runtime: Runtime,
    members: Members,
    shape: tuple[int, int],
    form: Form,
    rank: int,
    down: Format | None,
    up: Format | None,
    loss: float,
) -> _Candidate:
    names = (None if format is None else format.name for format in (down, up))
    reason = "it is worth its size" if form == "dense" and up is None else None
    plan = GroupPlan(members, *shape, form, rank, reason, float(loss), *names)
    return _Candidate((plan,), group_bytes(plan, runtime), float(loss))
