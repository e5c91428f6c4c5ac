"""Compress a model: walk its layers, fit their groups, keep each layer as it is finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.paired_stream import PairedStream
from pipeline.checkpoint.install import group_entries, install_
from pipeline.compress.calibrated import Calibrated
from pipeline.compress.factorize.second_moments import regular
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.fit_group import Fitted, group_report, submit_fit
from pipeline.compress.learn_rounding import Learning, learn_rounding_
from pipeline.compress.methods import ONE_SIDED, Fit
from pipeline.compress.plan.plan import GroupPlan, RankPlan
from pipeline.memory import return_free_memory
from pipeline.model.structure import Group, Layer
from pipeline.progress import track
from pipeline.workers.workers import InOrder, Result


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

    Where every layer is fitted to what it saw in the original model, the calibrated model's workers
    fit groups of several layers while the inputs go on; else those of one group of inputs.

    Args:
        calibrated: the model, changed in place, and what it is calibrated on.
        plan: form and rank of every group.
        dtype: what the factors are rounded to.
        fit: how they are fitted; `calibrated` is measured with gradients where it is two-sided.
        finished: where finished layers are kept; layers found there are not computed again.

    Raises:
        InputError: activations that are not finite, or a moment that cannot be used.
    """
    walk = _Walk(calibrated, dtype, fit, finished)
    for index, layer in enumerate(track(calibrated.layers, "compress")):
        walk.layer_(index, layer, plan.layers[layer.name])
    walk.waiting.finish()
    return Compressed(calibrated.model, walk.modules, walk.reports)


@dataclass
class _Layer:
    """A layer on its way.

    Attributes:
        index: of the layer.
        layer: its structure.
        planned: its groups, as the plan has them.
        wanted: those that change, in the order they run.
    """

    index: int
    layer: Layer
    planned: tuple[GroupPlan, ...]
    wanted: list[GroupPlan] = field(default_factory=list)


class _Walk:
    """The walk through the layers.

    Args:
        calibrated: see `compress_`.
        dtype: see there.
        fit: see there.
        finished: see there.

    Attributes:
        modules: entries of the layers that are finished.
        reports: of their groups.
        waiting: layers whose groups are being fitted elsewhere.
    """

    def __init__(
        self,
        calibrated: Calibrated,
        dtype: torch.dtype,
        fit: Fit,
        finished: FinishedLayers | None,
    ) -> None:
        self.model, self.workers = calibrated.model, calibrated.workers
        self.stream, self.dtype, self.fit, self.finished = (
            calibrated.stream(fit),
            dtype,
            fit,
            finished,
        )
        self.statistics = calibrated.statistics if fit.two_sided else None
        self.learning = Learning(fit.learned_steps, None if finished is None else finished.folder)
        self.modules: dict[str, dict[str, Any]] = {}
        self.reports: list[dict[str, Any]] = []
        self.waiting: InOrder[_Layer, Fitted] = InOrder(self.workers, self._install_and_keep_)

    def layer_(self, index: int, layer: Layer, planned: tuple[GroupPlan, ...]) -> None:
        """Compress a layer, or find it finished."""
        self._enter_(_Layer(index, layer, planned))
        self.stream.leave(index)
        return_free_memory()

    def _enter_(self, here: _Layer) -> None:
        """Go into a layer, and change it, or let others fit what will change it."""
        if self.finished is not None and _is_finished(self.finished, here.layer.name, here.planned):
            self.waiting.finish()
            tensors, groups = self.finished.load(here.layer.name)
            self.stream.enter(here.index, measure=False)
            install_(self.model, plan_entries(here.planned), tensors)
            self._add(here, groups)
            return
        self.stream.enter(here.index)
        if self.fit.mix is None:
            results = [
                result for source in here.layer.largest_first for result in self._fits(here, source)
            ]
            self.waiting.add(here, results)
            return
        fitted: list[Fitted] = []
        for source in here.layer.groups:
            before = len(here.wanted)
            found = [result.get() for result in self._fits(here, source)]
            # What runs behind them reads what they return now.
            self._install_(here.wanted[before:], found)
            fitted += found
        self._keep_(here, fitted)

    def _fits(self, here: _Layer, source: Group) -> list[Result[Fitted]]:
        """Submit the groups of what reads one input."""
        wanted = [g for g in here.planned if g.members[0] in source.members and not g.is_unchanged]
        if not wanted:
            return []
        here.wanted += wanted
        seen, drift = self.stream.measure(here.index, source.name)
        inputs = InputMoments(regular(seen), drift)
        return [self._fit(group, inputs) for group in wanted]

    def _fit(self, group: GroupPlan, inputs: InputMoments) -> Result[Fitted]:
        weights = [self.model.get_submodule(member).weight.detach() for member in group.members]
        statistics = None if self.statistics is None else self.statistics.of(group.members)
        return submit_fit(self.workers, group, weights, inputs, statistics, self.fit, self.dtype)

    def _install_(self, groups: Sequence[GroupPlan], fitted: Sequence[Fitted]) -> None:
        for group, found in zip(groups, fitted, strict=True):
            install_(self.model, plan_entries((group,)), found.tensors)

    def _install_and_keep_(self, here: _Layer, fitted: list[Fitted]) -> None:
        self._install_(here.wanted, fitted)
        self._keep_(here, fitted)

    def _keep_(self, here: _Layer, fitted: Sequence[Fitted]) -> None:
        """Learn a layer's rounding, if that is asked for, and keep it."""
        tensors = {name: tensor for found in fitted for name, tensor in found.tensors.items()}
        reports = {group.members: group_report(group) for group in here.planned}
        reports |= {g.members: f.report for g, f in zip(here.wanted, fitted, strict=True)}
        groups = [reports[group.members] for group in here.planned]
        codes = {name: blocks for found in fitted for name, blocks in found.codes.items()}
        if self.learning.steps and codes and isinstance(self.stream, PairedStream):
            learned, errors = learn_rounding_(
                self.stream, here.index, codes, self.learning, self.statistics
            )
            tensors, groups = tensors | learned, [group | errors for group in groups]
        if self.finished is not None:
            self.finished.add(here.layer.name, tensors, groups)
            _rebind_(self.model, self.finished.load(here.layer.name)[0])
        self._add(here, groups)

    def _add(self, here: _Layer, groups: list[dict[str, Any]]) -> None:
        self.modules |= plan_entries(here.planned)
        self.reports += groups


def _is_finished(finished: FinishedLayers, name: str, planned: tuple[GroupPlan, ...]) -> bool:
    """Whether a layer is on disk whole, and with the report of every group of the plan."""
    if name not in finished:
        return False
    _, reports = finished.load(name)
    return len(reports) == len(planned) and all(
        report.items() >= json.loads(json.dumps(group_report(group))).items()
        and isinstance(report.get("relative_error"), float)
        for report, group in zip(reports, planned, strict=True)
    )


def plan_entries(planned: Sequence[GroupPlan]) -> dict[str, dict[str, Any]]:
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
