"""Compress a model: walk its layers, fit their groups, keep each layer as it is finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.layer_stream import PairedStream
from pipeline.checkpoint.install import (
    dense_tensors,
    group_entries,
    group_tensors,
    install_,
    member_codes,
)
from pipeline.compress.calibrated import Calibrated
from pipeline.compress.factorize.factors import Factors, Rounding, relative_output_error
from pipeline.compress.factorize.whitened_svd import InputMoments, regular
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.learn_rounding import Learning, learn_rounding_
from pipeline.compress.methods import ONE_SIDED, Fit
from pipeline.compress.plan.layer_costs import GroupStatistics
from pipeline.compress.plan.plan import GroupPlan, RankPlan
from pipeline.errors import InputError
from pipeline.lazy import imported
from pipeline.memory import return_free_memory
from pipeline.model.structure import Layer
from pipeline.progress import track
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks


@dataclass
class Compressed:
    """A compressed model.

    Attributes:
        model: the same object that was given, its linears replaced by factored ones.
        modules: `quantization_config.modules` entries of the factored linears.
        groups: one report for each group: form, rank, relative error, max |A'|, reason.
    """

    model: PreTrainedModel
    modules: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]


def compress_(
    calibrated: Calibrated,
    plan: RankPlan,
    *,
    dtype: torch.dtype,
    fit: Fit = ONE_SIDED,
    finished: FinishedLayers | None = None,
) -> Compressed:
    """Replace the model's linears by what the plan asks for, layer by layer.

    Args:
        calibrated: the model, changed in place, and what it is calibrated on.
        plan: form and rank of every group.
        dtype: what the factors are rounded to.
        fit: how they are fitted; `calibrated` is measured with gradients where it is two-sided.
        finished: where finished layers are kept; layers found there are not computed again.

    Raises:
        InputError: activations that are not finite, or a moment that cannot be used.
    """
    model, stream = calibrated.model, calibrated.stream(fit)
    statistics = calibrated.statistics if fit.two_sided else None
    learning = Learning(fit.learned_steps, None if finished is None else finished.folder)
    codes = learning.codes if fit.learned_steps else None
    factor = partial(_fit_group, model, fit=fit, statistics=statistics, dtype=dtype, codes=codes)
    modules: dict[str, dict[str, Any]] = {}
    reports: list[dict[str, Any]] = []
    for index, layer in enumerate(track(calibrated.layers, "compress")):
        planned = plan.layers[layer.name]
        if finished is not None and _is_finished(finished, layer.name, planned):
            tensors, groups = finished.load(layer.name)
            stream.enter(index, measure=False)
            install_(model, _plan_entries(planned), tensors)
        else:
            stream.enter(index)
            tensors, groups = _fit_layer_(
                model, layer, planned, partial(stream.measure, index), factor
            )
            if learning.codes and isinstance(stream, PairedStream):
                learned, errors = learn_rounding_(stream, index, learning, statistics)
                tensors, groups = tensors | learned, [group | errors for group in groups]
                learning.codes.clear()
            if finished is not None:
                finished.add(layer.name, tensors, groups)
                _rebind_(model, finished.load(layer.name)[0])
        stream.leave(index)
        modules |= _plan_entries(planned)
        reports += groups
        return_free_memory()
    return Compressed(model, modules, reports)


def _is_finished(finished: FinishedLayers, name: str, planned: tuple[GroupPlan, ...]) -> bool:
    """Whether a layer is on disk whole, and with the report of every group of the plan."""
    if name not in finished:
        return False
    _, reports = finished.load(name)
    return len(reports) == len(planned) and all(
        report.items() >= json.loads(json.dumps(_group_report(group))).items()
        and isinstance(report.get("relative_error"), float)
        for report, group in zip(reports, planned, strict=True)
    )


def _fit_layer_(
    model: PreTrainedModel,
    layer: Layer,
    planned: tuple[GroupPlan, ...],
    measure: Callable[[str], tuple[torch.Tensor, torch.Tensor | None]],
    factor: Callable[[GroupPlan, InputMoments], _Fitted],
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Fit and install one layer, group after group in the order they run: tensors and reports."""
    tensors: dict[str, torch.Tensor] = {}
    reports = {group.members: _group_report(group) for group in planned}
    for source in layer.groups:
        wanted = [g for g in planned if g.members[0] in source.members and not g.is_unchanged]
        if not wanted:
            continue
        seen, drift = measure(source.name)
        inputs = InputMoments(regular(seen), drift)
        for group in wanted:
            new, reports[group.members] = factor(group, inputs)
            install_(model, _plan_entries((group,)), new)
            tensors |= new
    return tensors, [reports[group.members] for group in planned]


def _plan_entries(planned: tuple[GroupPlan, ...]) -> dict[str, dict[str, Any]]:
    """`quantization_config.modules` entries of the groups that change."""
    entries: dict[str, dict[str, Any]] = {}
    for group in planned:
        if not group.is_unchanged:
            formats = (group.down_format, group.up_format)
            entries |= group_entries(group.members, group.form, group.rank, *formats)
    return entries


def _rebind_(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Let factors that are installed read from other tensors of equal values.

    Tensors that were read from a file stay in that file until they are used, and leave memory
    again when it is needed: a model larger than memory is compressed layer by layer.
    """
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        held = getattr(model.get_submodule(path), attribute)
        if held.dtype == tensor.dtype:
            held.data = tensor


_Fitted = tuple[dict[str, torch.Tensor], dict[str, Any]]


@dataclass(frozen=True)
class _Problem:
    """A stack, what it should be, and in what geometry errors of it count."""

    stack: torch.Tensor
    heights: list[int]
    target: torch.Tensor
    inputs: InputMoments
    geometry: torch.Tensor
    sensitivities: list[torch.Tensor]


def _fit_group(
    model: PreTrainedModel,
    group: GroupPlan,
    inputs: InputMoments,
    fit: Fit,
    statistics: GroupStatistics | None,
    dtype: torch.dtype,
    codes: dict[str, Blocks] | None = None,
) -> _Fitted:
    """The tensors a checkpoint stores for a group that changes, and its report.

    `codes` is given those of its quantised matrices, by the module that holds them.

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
        target = inputs.target(stack, fit.mix or 0.0)
        problem = _Problem(stack, heights, target, inputs, geometry, sensitivities)
        found: dict[str, Blocks] = {} if codes is None else codes
        if group.form == "dense":
            return _quantized_dense(group, problem, fit, found)
        return _factored(group, problem, fit, dtype, found)
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise InputError(
            "A group of matrices cannot be factored or rounded.",
            where=", ".join(group.members),
            observed=str(error),
            change="calibrate on more text, or keep this group dense in the plan",
        ) from error


def _group_report(group: GroupPlan) -> dict[str, Any]:
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


def _factored(
    group: GroupPlan, problem: _Problem, fit: Fit, dtype: torch.dtype, codes: dict[str, Blocks]
) -> _Fitted:
    """Tensors and report of matrices that become a product."""
    inputs, geometry, sensitivities = problem.inputs, problem.geometry, problem.sensitivities
    b, a = imported(fit.factorize)(
        problem.stack, problem.target, group.rank, inputs, geometry, sensitivities
    )
    factors = Factors.stored(b, a, problem.target, inputs.seen, group.form)
    rounding: Rounding = imported(fit.quantize)
    rounded = rounding.factors(factors, problem.target, geometry, sensitivities, group.formats)
    stored = rounded.factors
    report = _group_report(group) | {"relative_error": factors.relative_error}
    if rounded.down is not None or rounded.up is not None:
        error = relative_output_error(problem.target, stored.product(), inputs.seen)
        report["rounded_relative_error"] = error
    if group.form == "skip":
        sizes = stored.down.abs()
        report["largest_interpolation"] = float(sizes.max()) if sizes.numel() else 0.0
    if rounded.down is not None:
        codes[f"{group.members[0]}.down.stored"] = rounded.down
    if rounded.up is not None:
        codes |= member_codes(group.members, problem.heights, rounded.up, ".up.stored")
    down = stored.down if rounded.down is None else rounded.down
    up = stored.up if rounded.up is None else rounded.up
    tensors = group_tensors(group.members, problem.heights, down, up, stored.permutation, dtype)
    return tensors, report


def _quantized_dense(
    group: GroupPlan, problem: _Problem, fit: Fit, codes: dict[str, Blocks]
) -> _Fitted:
    """Tensors and report of matrices that stay dense, quantised."""
    rounding: Rounding = imported(fit.quantize)
    format = Format.parse(group.up_format or "")
    rounded = rounding.matrix(problem.target, format, problem.geometry, problem.sensitivities)
    codes |= member_codes(group.members, problem.heights, rounded)
    error = relative_output_error(problem.target, rounded.values(), problem.inputs.seen)
    report = _group_report(group) | {"relative_error": 0.0, "rounded_relative_error": error}
    return dense_tensors(group.members, problem.heights, rounded), report
