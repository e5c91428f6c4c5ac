"""Fit one group of matrices as a plan asks: tensors in, tensors out.

A group becomes a product of two factors, or stays dense; either may be quantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint.install import dense_tensors, group_tensors, member_codes
from pipeline.compress.factorize.factors import (
    Factors,
    QuantizedFactors,
    Rounding,
    relative_output_error,
)
from pipeline.compress.factorize.second_moments import Moment
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.fit_memory import fit_bytes
from pipeline.compress.methods import Fit
from pipeline.compress.plan.plan import GroupPlan
from pipeline.compress.plan.stack_costs import OutputStatistics
from pipeline.errors import InputError
from pipeline.lazy import imported
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks
from pipeline.quantize.sensitivity import Sensitivity
from pipeline.workers.workers import Result, Workers


@dataclass(frozen=True)
class Fitted:
    """A group that was fitted.

    Attributes:
        tensors: what a checkpoint stores for it, by name.
        report: its entry of report.json.
        codes: of its quantised matrices, by the module that holds them.
    """

    tensors: dict[str, torch.Tensor]
    report: dict[str, Any]
    codes: dict[str, Blocks]


@dataclass(frozen=True)
class _Problem:
    """A stack, what it should be, and what errors of it are worth; None weighs outputs alike."""

    stack: torch.Tensor
    heights: list[int]
    target: torch.Tensor
    inputs: InputMoments
    statistics: OutputStatistics | None

    def geometry(self) -> Moment:
        """S in which errors count, float [n, n]."""
        seen = self.inputs.seen
        return seen if self.statistics is None else self.statistics.geometry(seen)

    def sensitivities(self) -> list[Sensitivity]:
        """G of each member."""
        return [] if self.statistics is None else self.statistics.sensitivities()


def fit_group(
    group: GroupPlan,
    weights: Sequence[torch.Tensor],
    inputs: InputMoments,
    statistics: OutputStatistics | None,
    fit: Fit,
    dtype: torch.dtype,
) -> Fitted:
    """What is stored for a group that changes.

    Args:
        group: form, rank and formats.
        weights: W of each member, float [m_i, n].
        inputs: moments of what they read.
        statistics: of what they return; None weighs all outputs alike.
        fit: how.
        dtype: of what is stored and not quantised.

    Raises:
        InputError: the group cannot be factored or rounded; names its members.
    """
    try:
        stack = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        heights = [len(weight) for weight in weights]
        target = inputs.target(stack, fit.mix or 0.0)
        problem = _Problem(stack, heights, target, inputs, statistics if fit.two_sided else None)
        if group.form == "dense":
            return _quantized_dense(group, problem, fit)
        return _factored(group, problem, fit, dtype)
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise InputError(
            "A group of matrices cannot be factored or rounded.",
            where=", ".join(group.members),
            observed=str(error),
            change="calibrate on more text, or keep this group dense in the plan",
        ) from error


def submit_fit(
    workers: Workers,
    group: GroupPlan,
    weights: Sequence[torch.Tensor],
    inputs: InputMoments,
    statistics: OutputStatistics | None,
    fit: Fit,
    dtype: torch.dtype,
) -> Result[Fitted]:
    """Let workers do what `fit_group` does, with as much memory as it takes."""
    return workers.submit(
        ", ".join(group.members),
        fit_group,
        group,
        weights,
        inputs,
        statistics,
        fit,
        dtype,
        needed_bytes=fit_bytes(
            group,
            [len(weight) for weight in weights],
            itemsize=weights[0].itemsize,
            drifted=inputs.drift is not None,
        ),
    )


def group_report(group: GroupPlan) -> dict[str, Any]:
    """What report.json says of a group whatever its form."""
    report: dict[str, Any] = {
        "members": list(group.members),
        "form": group.form,
        "rank": group.rank,
        "dense_parameters": group.dense_parameters,
        "kept_parameters": group.kept_parameters,
        "expected_kl": group.expected_kl,
    }
    formats = {"down_style": group.down_format, "up_style": group.up_format}
    report |= {name: format for name, format in formats.items() if format is not None}
    if group.is_unchanged:
        report |= {"relative_error": 0.0, "reason": group.reason}
    return report


def _factored(group: GroupPlan, problem: _Problem, fit: Fit, dtype: torch.dtype) -> Fitted:
    """Matrices that become a product."""
    rounded = _rounded(group, problem, fit)
    stored = rounded.factors
    report = group_report(group) | {"relative_error": stored.relative_error}
    if rounded.down is not None or rounded.up is not None:
        error = relative_output_error(problem.target, stored.product, problem.inputs.seen)
        report["rounded_relative_error"] = error
    if group.form == "skip":
        sizes = stored.down.abs()
        report["largest_interpolation"] = float(sizes.max()) if sizes.numel() else 0.0
    codes: dict[str, Blocks] = {}
    if rounded.down is not None:
        codes[f"{group.members[0]}.down.stored"] = rounded.down
    if rounded.up is not None:
        codes |= member_codes(group.members, problem.heights, rounded.up, ".up.stored")
    down = stored.down if rounded.down is None else rounded.down
    up = stored.up if rounded.up is None else rounded.up
    tensors = group_tensors(group.members, problem.heights, down, up, stored.permutation, dtype)
    return Fitted(tensors, report, codes)


def _rounded(group: GroupPlan, problem: _Problem, fit: Fit) -> QuantizedFactors:
    """Factors in their formats; those that are not rounded yet are held by nobody else."""
    if not any(group.formats):
        return QuantizedFactors(_cut(group, problem, fit), None, None)
    rounding: Rounding = imported(fit.quantize)
    return rounding.factors(
        _cut(group, problem, fit),
        problem.target,
        problem.geometry().double(),
        problem.sensitivities(),
        group.formats,
    )


def _cut(group: GroupPlan, problem: _Problem, fit: Fit) -> Factors:
    """The product at the rank of the plan, in the form that is stored."""
    b, a = imported(fit.factorize)(
        problem.stack,
        problem.target,
        group.rank,
        problem.inputs,
        problem.geometry(),
        problem.sensitivities(),
    )
    return Factors.stored_(b, a, problem.target, problem.inputs.seen, group.form)


def _quantized_dense(group: GroupPlan, problem: _Problem, fit: Fit) -> Fitted:
    """Matrices that stay dense, quantised."""
    rounding: Rounding = imported(fit.quantize)
    format = Format.parse(group.up_format or "")
    geometry = problem.geometry().double()
    rounded = rounding.matrix(problem.target, format, geometry, problem.sensitivities())
    del geometry
    error = relative_output_error(problem.target, rounded.values_of, problem.inputs.seen)
    report = group_report(group) | {"relative_error": 0.0, "rounded_relative_error": error}
    tensors = dense_tensors(group.members, problem.heights, rounded)
    return Fitted(tensors, report, member_codes(group.members, problem.heights, rounded))
