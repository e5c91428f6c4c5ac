"""One group of linears into the tensors that are stored, as a method fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.install import dense_tensors, group_tensors
from pipeline.compress.factorize.factors import relative_output_error, stored_factors
from pipeline.compress.factorize.quantized_factors import Rounding, latent_map, values_of
from pipeline.compress.factorize.targets import propagated_target
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.methods import Fit
from pipeline.compress.plan.layer_costs import GroupStatistics
from pipeline.compress.plan.plan import GroupPlan
from pipeline.errors import InputError
from pipeline.lazy import imported
from pipeline.quantize.formats import Format, parse_format

Fitted = tuple[dict[str, torch.Tensor], dict[str, Any]]


@dataclass(frozen=True)
class _Problem:
    """A stack, what it should be, and in what geometry errors of it count."""

    stack: torch.Tensor
    heights: list[int]
    target: torch.Tensor
    inputs: InputMoments
    geometry: torch.Tensor
    sensitivities: list[torch.Tensor]


def fit_group(
    model: PreTrainedModel,
    group: GroupPlan,
    inputs: InputMoments,
    fit: Fit,
    statistics: GroupStatistics | None,
    dtype: torch.dtype,
) -> Fitted:
    """The tensors a checkpoint stores for a group that changes, and its report.

    Raises:
        InputError: the group cannot be factored or rounded; names its members.
    """
    weights = [model.get_submodule(member).weight.detach() for member in group.members]
    geometry, sensitivities = inputs.seen, []
    if fit.two_sided and statistics is not None:
        geometry = statistics.geometry(group.members, inputs.seen)
        sensitivities = statistics.sensitivities(group.members)
    try:
        stack, heights = torch.cat(weights), [len(w) for w in weights]
        target = _target(stack, inputs, fit)
        problem = _Problem(stack, heights, target, inputs, geometry, sensitivities)
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
    styles = {"down_style": group.down_style, "up_style": group.up_style}
    report |= {name: style for name, style in styles.items() if style is not None}
    if group.is_unchanged:
        report |= {"relative_error": 0.0, "reason": group.reason}
    return report


def _target(stack: torch.Tensor, inputs: InputMoments, fit: Fit) -> torch.Tensor:
    """What the stack should be, given what it will be fed; float64 [m, n]."""
    if inputs.drift is None:
        return stack.double()
    return propagated_target(stack, inputs.seen, inputs.drift, fit.mix or 0.0)


def _factored(group: GroupPlan, problem: _Problem, fit: Fit, dtype: torch.dtype) -> Fitted:
    """Tensors and report of matrices that become a product."""
    inputs, geometry, sensitivities = problem.inputs, problem.geometry, problem.sensitivities
    b, a = imported(fit.factorize)(
        problem.stack, problem.target, group.rank, inputs, geometry, sensitivities
    )
    factors = stored_factors(b, a, problem.target, inputs.seen, group.form)
    rounding: Rounding = imported(fit.quantize)
    formats = (_format(group.down_style), _format(group.up_style))
    rounded = rounding.factors(factors, problem.target, geometry, sensitivities, formats)
    stored = rounded.factors
    report = group_report(group) | {"relative_error": factors.relative_error}
    if rounded.down is not None or rounded.up is not None:
        product = stored.up @ latent_map(stored)
        error = relative_output_error(problem.target, product, inputs.seen)
        report["rounded_relative_error"] = error
    if group.form == "skip":
        sizes = stored.down.abs()
        report["largest_interpolation"] = float(sizes.max()) if sizes.numel() else 0.0
    down = stored.down if rounded.down is None else rounded.down
    up = stored.up if rounded.up is None else rounded.up
    tensors = group_tensors(group.members, problem.heights, down, up, stored.permutation, dtype)
    return tensors, report


def _quantized_dense(group: GroupPlan, problem: _Problem, fit: Fit) -> Fitted:
    """Tensors and report of matrices that stay dense, quantised."""
    rounding: Rounding = imported(fit.quantize)
    format = parse_format(group.up_style or "")
    codes = rounding.matrix(problem.target, format, problem.geometry, problem.sensitivities)
    error = relative_output_error(problem.target, values_of(codes), problem.inputs.seen)
    report = group_report(group) | {"relative_error": 0.0, "rounded_relative_error": error}
    return dense_tensors(group.members, problem.heights, codes), report


def _format(name: str | None) -> Format | None:
    return None if name is None else parse_format(name)
