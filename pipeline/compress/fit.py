"""One group of linears into the tensors that are stored, under one of the ways to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.compress.factor import Factors, stored_factors
from pipeline.compress.install import group_tensors
from pipeline.compress.methods import Fit
from pipeline.compress.plan import GroupPlan
from pipeline.compress.propagate import propagated_target, reconstructed_factors
from pipeline.compress.statistics import GroupStatistics
from pipeline.compress.truncate import whitened_spectrum
from pipeline.compress.whiten import whitening_roots
from pipeline.errors import InputError


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
    """The tensors a checkpoint stores for a group that is not dense, and its report.

    Raises:
        InputError: the group cannot be factored; names its members.
    """
    weights = [model.get_submodule(member).weight.detach() for member in group.members]
    geometry, sensitivities = inputs.seen, []
    if fit.two_sided and survey is not None:
        geometry = survey.geometry(group.members, inputs.seen)
        sensitivities = survey.sensitivities(group.members)
    try:
        factors = _factors(torch.cat(weights), group, inputs, fit, geometry, sensitivities)
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise InputError(
            "A group of matrices cannot be factored.",
            where=", ".join(group.members),
            observed=str(error),
            change="calibrate on more text, or keep this group dense in the plan",
        ) from error
    report = group_report(group) | {"relative_error": factors.relative_error}
    if group.form == "skip":
        sizes = factors.down.abs()
        report["largest_interpolation"] = float(sizes.max()) if sizes.numel() else 0.0
    return group_tensors(group.members, [len(w) for w in weights], factors, dtype), report


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
    if group.form == "dense":
        report |= {"relative_error": 0.0, "reason": group.reason}
    return report


def _factors(
    stack: torch.Tensor,
    group: GroupPlan,
    inputs: Inputs,
    fit: Fit,
    geometry: torch.Tensor,
    sensitivities: list[torch.Tensor],
) -> Factors:
    if inputs.drift is None:
        target = stack
    else:
        target = propagated_target(stack, inputs.seen, inputs.drift, fit.mix or 0.0)
    start = stack if fit.reconstruct else target
    spectrum = whitened_spectrum(start, geometry, sensitivities, inputs.roots)
    b, a = spectrum.factors(group.rank)
    if fit.reconstruct:
        b, a = reconstructed_factors(b, a, target, inputs.seen)
    return stored_factors(b, a, target, inputs.seen, group.form)
