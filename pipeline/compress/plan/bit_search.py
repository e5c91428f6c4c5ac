"""Ranks, sharing and bit-widths of the whole model at once, under a budget of bytes (MLoRQ).

For every stack of matrices: dense in each format, and factored at every rank of a grid with each
pair of formats for its factors; those that another beats in bytes and expected KL are dropped.
Then one choice for each group, and for the embedding and the head, by one integer program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.compress.forms import Form
from pipeline.compress.plan.file_bytes import group_bytes, matrix_bytes
from pipeline.compress.plan.knapsack import allocate, undominated
from pipeline.compress.plan.plan import Curves, GroupPlan, Members, RankPlan
from pipeline.compress.plan.quantization_costs import StackCost
from pipeline.compress.plan.rank_search import (
    CANDIDATES_PER_GROUP,
    Candidate,
    combined,
    front_of,
    partitions,
    rank_step,
    thinned,
)
from pipeline.errors import UsageError
from pipeline.model.structure import Group, Layer
from pipeline.quantize.formats import Format, Runtime

QuantizationCosts = dict[Members, StackCost]
# Pairs of these are formed where matrices share an input.
_CANDIDATES_PER_STACK = 150
# More bytes than any matrix has: of a factor that the runtime does not take.
_REFUSED = 1 << 60


@dataclass(frozen=True)
class EmbeddingChoice:
    """One way to store an embedding, a head, or both where they are one matrix.

    Attributes:
        tables: module name -> format; empty where it stays as it is.
        stored_bytes: in the runtime's file.
        loss: KL to the original, nats per token, measured.
    """

    tables: dict[str, str]
    stored_bytes: int
    loss: float


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
) -> RankPlan:
    """Choose forms, ranks and formats for the whole model at once.

    Args:
        layers: the model's structure.
        curves: what truncation costs each stack that `stacks_of` names.
        costs: what rounding costs it.
        tables: the choices of every embedding and head.
        request: budget and formats.

    Raises:
        UsageError: no plan is small enough; says how large the smallest is.
    """
    groups = [(layer.name, group) for layer in layers for group in layer.groups]
    options = [_bit_candidates(group, curves, costs, request) for _, group in groups]
    sizes = [np.array([c.size for c in candidates]) for candidates in options]
    losses = [np.array([c.loss for c in candidates]) for candidates in options]
    sizes += [np.array([c.stored_bytes for c in choices]) for choices in tables]
    losses += [np.array([c.loss for c in choices]) for choices in tables]
    left = request.budget_bytes - request.fixed_bytes
    smallest = sum(int(s.min()) for s in sizes)
    if smallest > left:
        raise UsageError(
            "No plan is so small.",
            observed=f"{request.budget_bytes / 1e6:.2f} MB",
            expected=f"at least {(smallest + request.fixed_bytes + 5000) / 1e6:.2f} MB, the "
            f"smallest choice everywhere in formats of {request.runtime.name}",
        )
    chosen = allocate(sizes, losses, left)
    planned: dict[str, tuple[GroupPlan, ...]] = {layer.name: () for layer in layers}
    for (layer_name, _), candidates, index in zip(groups, options, chosen, strict=False):
        planned[layer_name] += candidates[index].stacks
    named: dict[str, str] = {}
    for choices, index in zip(tables, chosen[len(groups) :], strict=True):
        named |= choices[index].tables
    return RankPlan(planned, named)


def _bit_candidates(
    group: Group, curves: Curves, costs: QuantizationCosts, request: BitsRequest
) -> list[Candidate]:
    """The candidates of one group that no other beats, smallest first; sizes in bytes."""
    heights = dict(zip(group.members, group.out_features, strict=True))
    found: list[Candidate] = []
    known: dict[Members, list[Candidate]] = {}
    for partition in partitions(group.members, cat=request.cat):
        for stack in partition:
            if stack not in known:
                shape = (sum(heights[m] for m in stack), group.in_features)
                every = _stack_candidates(stack, shape, curves[stack], costs[stack], request)
                known[stack] = thinned(every, _CANDIDATES_PER_STACK)
        found += combined([known[stack] for stack in partition])
    return thinned(front_of(found), CANDIDATES_PER_GROUP)


def _stack_candidates(
    members: Members,
    shape: tuple[int, int],
    curve: np.ndarray,
    cost: StackCost,
    request: BitsRequest,
) -> list[Candidate]:
    """Dense in every format, and the best factored forms of every rank."""
    rows, columns = shape
    full = min(rows, columns)
    formats = (None, *request.runtime.formats)
    found = [
        _candidate(members, shape, "dense", full, None, format, loss, request)
        for format, loss in zip(formats, (0.0, *cost.dense), strict=True)
        if format is None or request.runtime.accepts(format, columns)
    ]
    ranks = _ranks(full, request)
    if not len(ranks):
        return front_of(found)
    form: Form = "skip" if request.skip else "low_rank"
    down, up = (np.pad(table, ((0, 0), (1, 0))) for table in cost.at(ranks))
    losses = curve[ranks][:, None, None] + down[:, :, None] + up[:, None, :]
    sizes = _factored_bytes(shape, ranks, formats, form, request.runtime)
    losses = np.where(sizes < _REFUSED, losses, np.inf)
    for place in undominated(sizes.ravel(), losses.ravel()):
        i, d, u = np.unravel_index(place, losses.shape)
        found.append(
            _candidate(
                members,
                shape,
                form,
                int(ranks[i]),
                formats[d],
                formats[u],
                float(losses[i, d, u]),
                request,
            )
        )
    return front_of(found)


def _ranks(full: int, request: BitsRequest) -> np.ndarray:
    """A grid, and where the runtime takes whole blocks only also the ranks that are some."""
    step = rank_step(full, request.multiple)
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
    members: Members,
    shape: tuple[int, int],
    form: Form,
    rank: int,
    down: Format | None,
    up: Format | None,
    loss: float,
    request: BitsRequest,
) -> Candidate:
    names = (None if format is None else format.name for format in (down, up))
    reason = "it is worth its size" if form == "dense" and up is None else None
    plan = GroupPlan(members, *shape, form, rank, reason, float(loss), *names)
    return Candidate((plan,), group_bytes(plan, request.runtime), float(loss))
