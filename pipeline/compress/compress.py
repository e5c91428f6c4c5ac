"""Compress a decoder: walk its layers, factor their groups, keep each layer as it is finished."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.moments import SecondMoment
from pipeline.calibrate.stream import LayerStream
from pipeline.compress.factor import factor_group
from pipeline.compress.install import group_entries, group_tensors, install_
from pipeline.compress.plan import GroupPlan, RankPlan
from pipeline.compress.work import FinishedLayers
from pipeline.errors import InputError
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
    model: PreTrainedModel,
    layers: list[Layer],
    plan: RankPlan,
    tokens: torch.Tensor,
    *,
    dtype: torch.dtype,
    finished: FinishedLayers | None = None,
    batch_size: int = 8,
) -> Compressed:
    """Replace the model's linears by the factors that the plan asks for, layer by layer.

    Second moments are those of the original model: a layer is replaced only after its outputs
    have been computed.

    Args:
        model: changed in place.
        layers: its structure.
        plan: form and rank of every group.
        tokens: calibration tokens, int64 [N, T].
        dtype: what the factors are rounded to.
        finished: where finished layers are kept; layers found there are not computed again.
        batch_size: sequences that go through a layer at once.

    Raises:
        InputError: activations that are not finite, or a moment that cannot be used.
    """
    stream = LayerStream(model, layers, tokens, batch_size)
    modules: dict[str, dict[str, Any]] = {}
    reports: list[dict[str, Any]] = []
    for index, layer in enumerate(track(layers, "compress")):
        done = finished is not None and layer.name in finished
        moments = stream.advance(index, measure=not done)
        if finished is not None and done:
            tensors, groups = finished.load(layer.name)
        else:
            tensors, groups = _factor_layer(model, layer, plan, moments, dtype)
            if finished is not None:
                finished.add(layer.name, tensors, groups)
        entries: dict[str, dict[str, Any]] = {}
        for group in plan.layers[layer.name]:
            if group.form != "dense":
                entries |= group_entries(group.members, group.form, group.rank)
        install_(model, entries, tensors)
        modules |= entries
        reports += groups
        return_free_memory()
    return Compressed(model, modules, reports)


def return_free_memory() -> None:
    """Give what is free on the heap back to the system, where the C library is glibc.

    Without it the heap, scattered by each layer's tensors, grows with the depth of the model,
    although the tensors that are alive do not.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _factor_layer(
    model: PreTrainedModel,
    layer: Layer,
    plan: RankPlan,
    moments: dict[str, SecondMoment],
    dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Factors and reports of one layer's groups."""
    input_of = {member: group.name for group in layer.groups for member in group.members}
    tensors: dict[str, torch.Tensor] = {}
    reports = []
    for group in plan.layers[layer.name]:
        new, report = _factor_one(model, group, moments[input_of[group.members[0]]], dtype)
        tensors |= new
        reports.append(report)
    return tensors, reports


def _factor_one(
    model: PreTrainedModel, group: GroupPlan, moment: SecondMoment, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    report: dict[str, Any] = {
        "members": list(group.members),
        "form": group.form,
        "rank": group.rank,
        "dense_parameters": group.dense_parameters,
        "kept_parameters": group.kept_parameters,
    }
    if group.form == "dense":
        return {}, report | {"relative_error": 0.0, "reason": group.reason}
    weights = [model.get_submodule(member).weight.detach() for member in group.members]
    try:
        factors = factor_group(torch.cat(weights), moment.mean(), group.form, group.rank)
    except ValueError as error:
        raise InputError(
            "A group of matrices cannot be factored.",
            where=", ".join(group.members),
            observed=str(error),
            change="calibrate on more text, or keep this group dense in the plan",
        ) from error
    tensors = group_tensors(group.members, [len(w) for w in weights], factors, dtype)
    report["relative_error"] = factors.relative_error
    if group.form == "skip":
        sizes = factors.down.abs()
        report["largest_interpolation"] = float(sizes.max()) if sizes.numel() else 0.0
    return tensors, report
