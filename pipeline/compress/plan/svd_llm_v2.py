"""SVD-LLM v2's allocation: of matrices of one kind, more is taken where truncation loses less."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from pipeline.compress.factorize.factors import Form
from pipeline.compress.methods import DEFAULT_METHOD
from pipeline.compress.plan.plan import (
    GroupPlan,
    Measured,
    RankBudget,
    RankPlan,
    rank_for_kept,
)
from pipeline.errors import UsageError
from pipeline.model.structure import Layer

_LEAST_KEPT = 0.05


def _removed_by_loss(losses: np.ndarray, removed: float) -> np.ndarray:
    """Fraction to remove of each of N matrices of one size: N removed s_i / sum(s), s = 1 / log L.

    L is the Frobenius norm |(W - W_r) X| of each at the uniform rank, float [N]; the fractions have
    mean `removed`, each at most 1 - LEAST_KEPT.
    """
    scores = 1 / np.log(np.maximum(losses, np.e))
    shares = np.full(len(scores), float(removed))
    free = np.ones(len(scores), dtype=bool)
    for _ in range(len(scores)):
        wanted = len(scores) * removed - shares[~free].sum()
        shares[free] = wanted * scores[free] / scores[free].sum()
        over = free & (shares > 1 - _LEAST_KEPT)
        if not over.any():
            break
        shares[over], free = 1 - _LEAST_KEPT, free & ~over
    return shares


def allocate_by_loss(model: Measured, budget: RankBudget) -> RankPlan:
    """More is taken where truncation loses less, among the matrices of equal layers.

    Raises:
        UsageError: the layers differ, so that no matrices are of one kind.
    """
    _require_equal_layers(model.layers)
    tails, inputs = model.output_tails()
    return _plan_by_loss(
        model.layers, tails, inputs, budget.kept, skip=budget.skip, multiple=budget.multiple
    )


def _require_equal_layers(layers: list[Layer]) -> None:
    shapes = {
        tuple((group.in_features, group.out_features) for group in layer.groups) for layer in layers
    }
    if len(shapes) > 1:
        raise UsageError(
            "This method compares the matrices of equal layers, and the model's differ.",
            where="--method svd-llm-v2",
            observed=f"{len(shapes)} kinds of layers",
            change=f"use --method {DEFAULT_METHOD}",
        )


def _plan_by_loss(
    layers: list[Layer],
    tails: Mapping[str, np.ndarray],
    tokens: int,
    kept: float,
    *,
    skip: bool = False,
    multiple: int = 1,
) -> RankPlan:
    """Ranks by truncation loss, kind by kind (Wang et al., NAACL 2025).

    Matrices are of one kind when they stand at the same place of their layers. `tails` are means
    over so many tokens; the loss is their sum.
    """
    form: Form = "skip" if skip else "low_rank"
    kinds: dict[tuple[int, int], list[tuple[str, str, int, int]]] = defaultdict(list)
    for layer in layers:
        for place, group in enumerate(layer.groups):
            for row, (member, rows) in enumerate(
                zip(group.members, group.out_features, strict=True)
            ):
                kinds[place, row].append((layer.name, member, rows, group.in_features))
    planned: dict[str, tuple[GroupPlan, ...]] = {layer.name: () for layer in layers}
    for kind in kinds.values():
        losses = [
            np.sqrt(tokens * tails[member][rank_for_kept(form, rows, columns, kept, multiple)])
            for _, member, rows, columns in kind
        ]
        removed = _removed_by_loss(np.array(losses), 1 - kept)
        for (layer_name, member, rows, columns), share in zip(kind, removed, strict=True):
            planned[layer_name] += (_group(member, rows, columns, form, 1 - share, multiple),)
    return RankPlan(planned)


def _group(
    member: str, rows: int, columns: int, form: Form, kept: float, multiple: int
) -> GroupPlan:
    rank = rank_for_kept(form, rows, columns, min(kept, 1.0), multiple)
    return GroupPlan.at_rank((member,), rows, columns, form, rank)
