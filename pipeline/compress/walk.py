"""Compress a decoder: walk its layers, factor their groups, keep each layer as it is finished."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.paired_stream import PairedStream
from pipeline.calibrate.precision import fast_products
from pipeline.checkpoint.install import group_entries, install_, rebind_
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.fit_group import Inputs, fit_group, group_report
from pipeline.compress.methods import ONE_SIDED, Fit
from pipeline.compress.plan.layer_costs import GroupStatistics
from pipeline.compress.plan.plan import GroupPlan, RankPlan
from pipeline.model.structure import Layer
from pipeline.progress import track

FactorOne = Callable[[GroupPlan, Inputs], tuple[dict[str, torch.Tensor], dict[str, Any]]]


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
    fit: Fit = ONE_SIDED,
    survey: GroupStatistics | None = None,
    finished: FinishedLayers | None = None,
    batch_size: int = 8,
    walk: Walk | None = None,
) -> Compressed:
    """Replace the model's linears by the factors that the plan asks for, layer by layer.

    Args:
        model: changed in place.
        layers: its structure.
        plan: form and rank of every group.
        tokens: calibration tokens, int64 [N, T].
        dtype: what the factors are rounded to.
        fit: how they are fitted.
        survey: of this model; needed when `fit` is two-sided.
        finished: where finished layers are kept; layers found there are not computed again.
        batch_size: sequences that go through a layer at once.
        walk: how the layers are gone through, of a model that takes no tokens; None for a decoder.

    Raises:
        InputError: activations that are not finite, or a moment that cannot be used.
    """
    factor = partial(fit_group, model, fit=fit, survey=survey, dtype=dtype)
    if walk is None:
        kind = _OneShot if fit.mix is None else _Propagated
        walk = kind(model, layers, tokens, batch_size)
    modules: dict[str, dict[str, Any]] = {}
    reports: list[dict[str, Any]] = []
    for index, layer in enumerate(track(layers, "compress")):
        planned = plan.layers[layer.name]
        if finished is not None and layer.name in finished:
            tensors, groups = finished.load(layer.name)
            walk.repeat(index, planned, tensors)
        else:
            tensors, groups = walk.factor(index, planned, factor)
            if finished is not None:
                finished.add(layer.name, tensors, groups)
                rebind_(model, finished.load(layer.name)[0])
        modules |= plan_entries(planned)
        reports += groups
        return_free_memory()
    return Compressed(model, modules, reports)


class Walk(Protocol):
    """A way to go through the layers, leaving each of them factored."""

    def factor(
        self, index: int, planned: tuple[GroupPlan, ...], factor: FactorOne
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Factor and install layer `index`, and go on to the next: tensors and reports."""
        ...

    def repeat(
        self, index: int, planned: tuple[GroupPlan, ...], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Install what an earlier run made of layer `index`, and go on to the next."""
        ...


class _OneShot:
    """Second moments are those of the original model: its outputs are computed, then it goes."""

    def __init__(
        self, model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, batch_size: int
    ) -> None:
        self.model, self.layers = model, layers
        self.stream = LayerStream(model, layers, tokens, batch_size)

    def factor(
        self, index: int, planned: tuple[GroupPlan, ...], factor: FactorOne
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        with fast_products(self.model):
            moments = self.stream.advance(index)
        read_by = _read_by(self.layers[index])
        inputs = {name: Inputs(moment.mean()) for name, moment in moments.items()}
        tensors: dict[str, torch.Tensor] = {}
        reports = []
        for group in planned:
            if group.is_unchanged:
                reports.append(group_report(group))
                continue
            new, report = factor(group, inputs[read_by[group.members[0]]])
            tensors |= new
            reports.append(report)
        install_(self.model, plan_entries(planned), tensors)
        return tensors, reports

    def repeat(
        self, index: int, planned: tuple[GroupPlan, ...], tensors: dict[str, torch.Tensor]
    ) -> None:
        with fast_products(self.model):
            self.stream.advance(index, measure=False)
        install_(self.model, plan_entries(planned), tensors)


class _Propagated:
    """Each group is fitted to what the groups before it, already replaced, will feed it."""

    def __init__(
        self, model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, batch_size: int
    ) -> None:
        self.model, self.layers = model, layers
        self.stream = PairedStream(model, layers, tokens, batch_size)

    def factor(
        self, index: int, planned: tuple[GroupPlan, ...], factor: FactorOne
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        self.stream.advance_original(index)
        read_by = _read_by(self.layers[index])
        tensors: dict[str, torch.Tensor] = {}
        reports = {g.members: group_report(g) for g in planned}
        for source in self.layers[index].groups:
            groups = [
                g for g in planned if read_by[g.members[0]] == source.name and not g.is_unchanged
            ]
            if not groups:
                continue
            inputs = Inputs(*self.stream.measure(index, source.name))
            for group in groups:
                new, reports[group.members] = factor(group, inputs)
                install_(self.model, plan_entries((group,)), new)
                tensors |= new
        self.stream.advance_compressed(index)
        return tensors, [reports[g.members] for g in planned]

    def repeat(
        self, index: int, planned: tuple[GroupPlan, ...], tensors: dict[str, torch.Tensor]
    ) -> None:
        self.stream.advance_original(index, measure=False)
        install_(self.model, plan_entries(planned), tensors)
        self.stream.advance_compressed(index)


def _read_by(layer: Layer) -> dict[str, str]:
    """Linear -> name of the group of linears that read the same input."""
    return {member: group.name for group in layer.groups for member in group.members}


def plan_entries(planned: tuple[GroupPlan, ...]) -> dict[str, dict[str, Any]]:
    """`quantization_config.modules` entries of the groups that change."""
    entries: dict[str, dict[str, Any]] = {}
    for group in planned:
        if not group.is_unchanged:
            styles = (group.down_style, group.up_style)
            entries |= group_entries(group.members, group.form, group.rank, *styles)
    return entries


def return_free_memory() -> None:
    """Give what is free on the heap back to the system, where the C library is glibc.

    Without it the heap, scattered by each layer's tensors, grows with the depth of the model,
    although the tensors that are alive do not.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
