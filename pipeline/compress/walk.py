"""Compress a model: walk its layers, fit their groups, keep each layer as it is finished."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.install import group_entries, install_, rebind_
from pipeline.compress.calibrated import Calibrated
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.fit_group import Fitted, fit_group, group_report
from pipeline.compress.methods import ONE_SIDED, Fit
from pipeline.compress.plan.plan import GroupPlan, RankPlan
from pipeline.model.structure import Layer
from pipeline.progress import track


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
    factor = partial(fit_group, model, fit=fit, statistics=statistics, dtype=dtype)
    modules: dict[str, dict[str, Any]] = {}
    reports: list[dict[str, Any]] = []
    for index, layer in enumerate(track(calibrated.layers, "compress")):
        planned = plan.layers[layer.name]
        if finished is not None and layer.name in finished:
            tensors, groups = finished.load(layer.name)
            stream.enter(index, measure=False)
            install_(model, _plan_entries(planned), tensors)
        else:
            stream.enter(index)
            tensors, groups = _fit_layer_(
                model, layer, planned, partial(stream.measure, index), factor
            )
            if finished is not None:
                finished.add(layer.name, tensors, groups)
                rebind_(model, finished.load(layer.name)[0])
        stream.leave(index)
        modules |= _plan_entries(planned)
        reports += groups
        _return_free_memory()
    return Compressed(model, modules, reports)


def _fit_layer_(
    model: PreTrainedModel,
    layer: Layer,
    planned: tuple[GroupPlan, ...],
    measure: Callable[[str], tuple[torch.Tensor, torch.Tensor | None]],
    factor: Callable[[GroupPlan, InputMoments], Fitted],
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Fit and install one layer, group after group in the order they run: tensors and reports."""
    tensors: dict[str, torch.Tensor] = {}
    reports = {group.members: group_report(group) for group in planned}
    for source in layer.groups:
        wanted = [g for g in planned if g.members[0] in source.members and not g.is_unchanged]
        if not wanted:
            continue
        inputs = InputMoments(*measure(source.name))
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
            styles = (group.down_style, group.up_style)
            entries |= group_entries(group.members, group.form, group.rank, *styles)
    return entries


def _return_free_memory() -> None:
    """Give what is free on the heap back to the system, where the C library is glibc.

    Without it the heap, scattered by each layer's tensors, grows with the depth of the model,
    although the tensors that are alive do not.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
