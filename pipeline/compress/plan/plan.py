"""The rank plan: for every group of matrices, its form and rank, as data that can be edited."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.artefact import write_json
from pipeline.compress.factorize.factors import Form
from pipeline.compress.plan.plan_file import WRITTEN_AS, read_plan_file
from pipeline.errors import InputError, UsageError
from pipeline.json_file import restated
from pipeline.model.structure import Layer
from pipeline.quantize.formats import Format

_SCHEMA = 1
Members = tuple[str, ...]
# Loss, in nats, of a stack of members at each rank from 0 to min(m, n).
Curves = dict[Members, np.ndarray]


@dataclass(frozen=True)
class GroupPlan:
    """What becomes of one stack of matrices that share an input.

    Attributes:
        members: dotted names of the linears, in stacking order.
        rows: m, the height of the stack.
        columns: n, the width of the input.
        form: "dense", "low_rank" or "skip".
        rank: r; min(m, n) for dense.
        reason: why it stays dense; None otherwise.
        expected_kl: what it is expected to cost, nats per token; None when it was not estimated.
        down_format: low-bit format of A' or A (see `pipeline.quantize.formats`); None for
            numbers of the checkpoint's type.
        up_format: of B' or B, or of the dense matrices, likewise.
    """

    members: tuple[str, ...]
    rows: int
    columns: int
    form: Form
    rank: int
    reason: str | None = None
    expected_kl: float | None = None
    down_format: str | None = None
    up_format: str | None = None

    @classmethod
    def at_rank(cls, members: Members, rows: int, columns: int, form: Form, rank: int) -> GroupPlan:
        """Factored at that rank; dense, and why, where that would not pay."""
        reason = _reason_to_stay_dense(form, rows, columns, rank)
        if reason:
            return cls(members, rows, columns, "dense", min(rows, columns), reason)
        return cls(members, rows, columns, form, rank)

    def to_json(self) -> dict[str, Any]:
        """The fields as plan.json has them, with the numbers before and after."""
        fields = {WRITTEN_AS.get(name, name): value for name, value in asdict(self).items()}
        return fields | {
            "members": list(self.members),
            "dense_parameters": self.dense_parameters,
            "kept_parameters": self.kept_parameters,
        }

    @property
    def is_unchanged(self) -> bool:
        """Whether the matrices are stored as they were."""
        return self.form == "dense" and self.up_format is None

    @property
    def formats(self) -> tuple[Format | None, Format | None]:
        """Of `down` and of `up`; None for numbers."""
        down, up = (
            None if name is None else Format.parse(name)
            for name in (self.down_format, self.up_format)
        )
        return down, up

    @property
    def dense_parameters(self) -> int:
        """Numbers in the matrices as they were."""
        return self.rows * self.columns

    @property
    def kept_parameters(self) -> int:
        """Numbers stored under this plan."""
        return _stored_parameters(self.form, self.rows, self.columns, self.rank)


@dataclass(frozen=True)
class RankPlan:
    """What becomes of every group, layer by layer, and of the embedding and the head.

    Attributes:
        layers: layer name -> its groups.
        embeddings: module name of an embedding or an LM head -> its low-bit format; those that
            are not named stay as they are.
        caches: what becomes of the KV cache, as `CachePlan.to_json` writes it; None for nothing.
    """

    layers: dict[str, tuple[GroupPlan, ...]]
    embeddings: dict[str, str] = field(default_factory=dict)
    caches: dict[str, Any] | None = None

    @property
    def groups(self) -> list[GroupPlan]:
        """All groups, first layer first."""
        return [group for layer in self.layers.values() for group in layer]

    @property
    def kept_fraction(self) -> float:
        """Parameters kept, as a fraction of those of the decoder's linear layers."""
        dense = sum(group.dense_parameters for group in self.groups)
        return sum(group.kept_parameters for group in self.groups) / dense

    @classmethod
    def load(
        cls, path: Path, layers: list[Layer], embeddings: tuple[Members, ...] = ()
    ) -> RankPlan:
        """Read a plan, perhaps edited by hand, and check it against a model.

        Args:
            path: of plan.json.
            layers: the model's structure.
            embeddings: names of the model's embedding and LM head; those of one matrix together.

        Raises:
            InputError: not a plan, or not one for this model; names group and field.
        """
        try:
            written, tables, caches = read_plan_file(path, _SCHEMA)
        except InputError as error:
            raise restated(error, "The rank plan cannot be read.", path) from error
        planned = {
            name: tuple(GroupPlan(**group) for group in groups) for name, groups in written.items()
        }
        _check_fit(path, planned, layers)
        _check_tables(path, tables, embeddings)
        return cls(planned, tables, caches)

    def save(self, path: Path) -> None:
        """Write plan.json."""
        layers = {
            name: [group.to_json() for group in groups] for name, groups in self.layers.items()
        }
        value = {"schema": _SCHEMA, "kept_fraction": self.kept_fraction, "layers": layers}
        caches = {} if self.caches is None else {"caches": self.caches}
        write_json(path, value | {"tables": self.embeddings} | caches)


@dataclass(frozen=True)
class EmbeddingChoice:
    """One way to store an embedding, a head, or both where they are one matrix.

    Attributes:
        embeddings: module name -> format; empty where it stays as it is.
        stored_bytes: in the runtime's file.
        loss: KL to the original, nats per token, measured.
    """

    embeddings: dict[str, str]
    stored_bytes: int
    loss: float


@dataclass(frozen=True)
class RankBudget:
    """What an allocation may choose.

    Attributes:
        kept: fraction of the parameters of the groups to keep, in (0, 1].
        cat: matrices that share an input may share their right factor.
        skip: factors are stored in block-skip form.
        multiple: ranks are multiples of this.
    """

    kept: float
    cat: bool = True
    skip: bool = True
    multiple: int = 1

    @property
    def form(self) -> Form:
        """Of the factors."""
        return "skip" if self.skip else "low_rank"


class Measured(Protocol):
    """A model as allocations see it; what is not looked at need not be measured.

    Attributes:
        layers: its structure.
    """

    layers: list[Layer]

    @property
    def curves(self) -> Curves:
        """Expected KL to the original of every stack at every rank."""
        ...

    def output_tails(self) -> tuple[dict[str, np.ndarray], int]:
        """Linear -> E |(W - W_r) x|^2 at each rank r; and how many inputs it is the mean over."""
        ...


def allocate_uniformly(model: Measured, budget: RankBudget) -> RankPlan:
    """Keep the same fraction of every group; nothing but the structure is looked at."""
    return uniform_plan(
        model.layers, budget.kept, cat=budget.cat, skip=budget.skip, multiple=budget.multiple
    )


def uniform_plan(
    layers: list[Layer], kept: float, *, cat: bool = True, skip: bool = True, multiple: int = 1
) -> RankPlan:
    """Keep the same fraction of every group.

    Args:
        layers: the decoder's structure.
        kept: fraction of the parameters to keep, in (0, 1].
        cat: matrices that share an input are stacked and share their right factor.
        skip: factors are stored in block-skip form.
        multiple: ranks are rounded down to a multiple of this.

    Raises:
        UsageError: `kept` outside (0, 1].
    """
    if not 0 < kept <= 1:
        raise UsageError(
            "The kept fraction is out of range.",
            observed=kept,
            expected="a number in (0, 1]: 0.8 keeps 80% of the decoder's linear parameters",
        )
    form: Form = "skip" if skip else "low_rank"
    planned = {}
    for layer in layers:
        stacks = []
        for group in layer.groups:
            heights = group.heights
            parts = [group.members] if cat else [(member,) for member in group.members]
            stacks += [(part, sum(heights[m] for m in part), group.in_features) for part in parts]
        planned[layer.name] = tuple(
            _uniform_group(members, rows, columns, form, kept, multiple)
            for members, rows, columns in stacks
        )
    return RankPlan(planned)


def _uniform_group(
    members: tuple[str, ...], rows: int, columns: int, form: Form, kept: float, multiple: int
) -> GroupPlan:
    if kept == 1:
        full = min(rows, columns)
        return GroupPlan(members, rows, columns, "dense", full, "everything is kept")
    rank = rank_for_kept(form, rows, columns, kept, multiple)
    return GroupPlan.at_rank(members, rows, columns, form, rank)


def _check_fit(path: Path, planned: dict[str, tuple[GroupPlan, ...]], layers: list[Layer]) -> None:
    shapes = {
        member: (height, group.in_features, group.members)
        for layer in layers
        for group in layer.groups
        for member, height in zip(group.members, group.out_features, strict=True)
    }
    groups = [group for layer in planned.values() for group in layer]
    named = [member for group in groups for member in group.members]
    if sorted(named) != sorted(shapes) or list(planned) != [layer.name for layer in layers]:
        odd = sorted(set(named) ^ set(shapes))
        raise InputError(
            "The rank plan is for another model.", where=path, observed=f"differs in {odd[:4]}"
        )
    for group in groups:
        heights = sum(shapes[member][0] for member in group.members)
        siblings = shapes[group.members[0]][2]
        if not set(group.members) <= set(siblings) or group.columns != shapes[group.members[0]][1]:
            raise InputError(
                "The rank plan stacks matrices that do not share an input.",
                where=f"{path}: {group.members[0]}",
                observed=", ".join(group.members),
                expected=f"a subset of {', '.join(siblings)}",
            )
        if heights != group.rows or not 1 <= group.rank <= min(group.rows, group.columns):
            raise InputError(
                "The rank plan has a group of impossible size.",
                where=f"{path}: {group.members[0]}",
                observed=f"{group.rows} rows, rank {group.rank}",
                expected=f"{heights} rows, rank 1 to {min(heights, group.columns)}",
            )


def _check_tables(path: Path, tables: dict[str, str], embeddings: tuple[Members, ...]) -> None:
    """Refuse formats of tables that the model has not, or two formats of one matrix."""
    known = [name for names in embeddings for name in names]
    odd = [name for name in tables if name not in known]
    if odd:
        raise InputError(
            "The rank plan names a table that the model has not, or has of a kind not known here.",
            where=f"{path}: tables",
            observed=", ".join(odd[:4]),
            expected=", ".join(known) or "none",
        )
    for names in embeddings:
        if len({tables.get(name) for name in names}) > 1:
            raise InputError(
                "The rank plan stores one matrix in two ways.",
                where=f"{path}: tables",
                observed=", ".join(f"{name}: {tables.get(name, 'as it is')}" for name in names),
                expected=f"one format for {' and '.join(names)}, which share their matrix",
            )


def _stored_parameters(form: Form, rows: int, columns: int, rank: int) -> int:
    """Numbers stored for a matrix of `rows` x `columns` (m x n).

    dense: m n. low_rank, W = B A: r (m + n). skip, W = B' [I A'] P: r (m + n - r); the
    permutation P is n small integers and is not counted, as in the literature.

    Raises:
        ValueError: rank outside [0, n].
    """
    if not 0 <= rank <= columns:
        raise ValueError(f"rank {rank} is outside [0, {columns}]")
    if form == "dense":
        return rows * columns
    if form == "low_rank":
        return rank * (rows + columns)
    return rank * (rows + columns - rank)


def rank_for_kept(form: Form, rows: int, columns: int, kept: float, multiple: int = 1) -> int:
    """Largest rank whose parameters are at most `kept` of the dense ones.

    low_rank: r = kept m n / (m + n). skip: the smaller root of r (m + n - r) = kept m n,
    r = ((m + n) - sqrt((m + n)^2 - 4 kept m n)) / 2.

    Args:
        form: what will be stored.
        rows: m, the height of the (stacked) matrix.
        columns: n, its width.
        kept: fraction of m n to keep, in (0, 1].
        multiple: the rank is rounded down to a multiple of this.

    Raises:
        ValueError: `kept` outside (0, 1], or `form` is dense.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept fraction {kept} is outside (0, 1]")
    dense = rows * columns
    total = rows + columns
    if form == "low_rank":
        rank = math.floor(kept * dense / total)
    elif form == "skip":
        rank = math.floor((total - math.sqrt(total * total - 4 * kept * dense)) / 2)
    else:
        raise ValueError("a dense matrix has no rank to choose")
    return min(rank, rows, columns) // multiple * multiple


def _reason_to_stay_dense(form: Form, rows: int, columns: int, rank: int) -> str | None:
    """Why a factorisation of this rank would not pay; None when it does."""
    if rank < 1:
        return f"the budget allows rank {rank}: nothing would be left of the matrix"
    if rank >= min(rows, columns):
        return f"rank {rank} is the full rank of {rows} x {columns}"
    stored = _stored_parameters(form, rows, columns, rank)
    if stored >= rows * columns:
        return f"rank {rank} would store {stored} numbers, the matrix itself {rows * columns}"
    return None
