"""One group of linears into the tensors that are stored, under one of the ways to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.install import dense_tensors, group_tensors
from pipeline.compress.factorize.factors import Factors, relative_output_error, stored_factors
from pipeline.compress.factorize.quantized_factors import (
    RoundedFactors,
    latent_map,
    nearest,
    nearest_factors,
    round_factors,
    values_of,
)
from pipeline.compress.factorize.targets import propagated_target, reconstructed_factors
from pipeline.compress.factorize.whitened_svd import whitened_spectrum, whitening_roots
from pipeline.compress.methods import Fit
from pipeline.compress.plan.layer_costs import GroupStatistics
from pipeline.compress.plan.plan import GroupPlan
from pipeline.errors import InputError
from pipeline.quantize.formats import Format, parse_format
from pipeline.quantize.gptq import round_with_feedback


@dataclass
class Inputs:
    """Second moments of what the linears of one group read, however they are stacked.

    Attributes:
        seen: of the input the factors will be given, float64 [n, n].
        drift: E[(x - x') x'^T], x' that input and x the original model's, float64 [n, n]; None when
            they are the same.
    """

    seen: torch.Tensor
    drift: torch.Tensor | None = None
    _roots: tuple[torch.Tensor, torch.Tensor] | None = None

    def roots(self, geometry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """R and R^-1 of the geometry, which is one and the same for every stack of the group."""
        if self._roots is None:
            self._roots = whitening_roots(geometry)
        return self._roots


def fit_group(
    model: PreTrainedModel,
    group: GroupPlan,
    inputs: Inputs,
    fit: Fit,
    survey: GroupStatistics | None,
    dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors a checkpoint stores for a group that changes, and its report.

    Raises:
        InputError: the group cannot be factored or rounded; names its members.
    """
    weights = [model.get_submodule(member).weight.detach() for member in group.members]
    geometry, sensitivities = inputs.seen, []
    if fit.two_sided and survey is not None:
        geometry = survey.geometry(group.members, inputs.seen)
        sensitivities = survey.sensitivities(group.members)
    stack, heights = torch.cat(weights), [len(w) for w in weights]
    try:
        target = _target(stack, inputs, fit)
        if group.form == "dense":
            return _few_bit_dense(group, target, heights, fit, inputs, geometry, sensitivities)
        factors = _factors(stack, target, group, inputs, fit, geometry, sensitivities)
        rounded = _rounded(factors, group, target, fit, geometry, sensitivities)
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise InputError(
            "A group of matrices cannot be factored or rounded.",
            where=", ".join(group.members),
            observed=str(error),
            change="calibrate on more text, or keep this group dense in the plan",
        ) from error
    report = group_report(group) | {"relative_error": factors.relative_error}
    if rounded.down is not None or rounded.up is not None:
        product = rounded.factors.up @ latent_map(rounded.factors)
        report["rounded_relative_error"] = relative_output_error(target, product, inputs.seen)
    if group.form == "skip":
        sizes = rounded.factors.down.abs()
        report["largest_interpolation"] = float(sizes.max()) if sizes.numel() else 0.0
    numbers = rounded.factors
    down = numbers.down if rounded.down is None else rounded.down
    up = numbers.up if rounded.up is None else rounded.up
    tensors = group_tensors(group.members, heights, down, up, numbers.permutation, dtype)
    return tensors, report


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


def _target(stack: torch.Tensor, inputs: Inputs, fit: Fit) -> torch.Tensor:
    """What the stack should be, given what it will be fed; float64 [m, n]."""
    if inputs.drift is None:
        return stack.double()
    return propagated_target(stack, inputs.seen, inputs.drift, fit.mix or 0.0)


def _factors(
    stack: torch.Tensor,
    target: torch.Tensor,
    group: GroupPlan,
    inputs: Inputs,
    fit: Fit,
    geometry: torch.Tensor,
    sensitivities: list[torch.Tensor],
) -> Factors:
    start = stack if fit.reconstruct else target
    spectrum = whitened_spectrum(start, geometry, sensitivities, inputs.roots)
    b, a = spectrum.factors(group.rank)
    if fit.reconstruct:
        b, a = reconstructed_factors(b, a, target, inputs.seen)
    return stored_factors(b, a, target, inputs.seen, group.form)


def _rounded(
    factors: Factors,
    group: GroupPlan,
    target: torch.Tensor,
    fit: Fit,
    geometry: torch.Tensor,
    sensitivities: list[torch.Tensor],
) -> RoundedFactors:
    """The factors in the formats that the plan names."""
    styles = (_style(group.down_style), _style(group.up_style))
    if fit.nearest:
        return nearest_factors(factors, styles)
    return round_factors(factors, target, geometry, sensitivities, styles)


def _few_bit_dense(
    group: GroupPlan,
    target: torch.Tensor,
    heights: list[int],
    fit: Fit,
    inputs: Inputs,
    geometry: torch.Tensor,
    sensitivities: list[torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and report of matrices that stay dense, in few bits."""
    style = parse_format(group.up_style or "")
    codes = (
        nearest(target, style)
        if fit.nearest
        else round_with_feedback(target, style, geometry, sensitivities)
    )
    error = relative_output_error(target, values_of(codes), inputs.seen)
    report = group_report(group) | {"relative_error": 0.0, "rounded_relative_error": error}
    return dense_tensors(group.members, heights, codes), report


def _style(name: str | None) -> Format | None:
    return None if name is None else parse_format(name)
