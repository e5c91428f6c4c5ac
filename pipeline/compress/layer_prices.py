"""What errors in a layer's weights really cost, over what the second order expects: a factor each.

A first plan is fitted layer by layer to what the original model feeds them, and the model is run
with one layer compressed at a time, on text that nothing was fitted to. What is expected is low,
most of all in the first layers: errors lie where the calibration text has seen little, inputs and
gradients are not independent, and every layer behind makes more of an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.measured_stream import MeasuredStream
from pipeline.checkpoint.install import install_
from pipeline.compress.factorize.second_moments import regular
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.finished_layers import keep_values, kept_values
from pipeline.compress.fit_group import submit_fit
from pipeline.compress.layer_trials import LayerTrials
from pipeline.compress.methods import Fit
from pipeline.compress.plan.layer_costs import GroupStatistics
from pipeline.compress.plan.plan import GroupPlan, RankPlan
from pipeline.compress.walk import plan_entries
from pipeline.model.structure import Layer
from pipeline.progress import track
from pipeline.workers.workers import Result, Workers

# Of text that nothing was fitted to: so many windows, whose logits are held meanwhile.
WINDOWS, _WINDOW_LENGTH = 4, 512
# A layer that costs less than this, nats a token, tells nothing of its factor.
_LEAST_KL = 1e-6


@dataclass(frozen=True)
class PricedModel:
    """A decoder whose plan is to be priced.

    Attributes:
        model: in evaluation mode; as it was afterwards.
        layers: its structure.
        statistics: what errors are expected to cost.
        tokens: text that the layers are fitted on, int64 [N, T].
        held_out: text that their costs are measured on, int64 [M, T].
        workers: who fits them and tries them.
    """

    model: PreTrainedModel
    layers: list[Layer]
    statistics: GroupStatistics
    tokens: torch.Tensor
    held_out: torch.Tensor
    workers: Workers


@torch.no_grad()
def layer_prices(priced: PricedModel, plan: RankPlan, fit: Fit, folder: Path) -> dict[str, float]:
    """Layer -> measured over expected KL of the errors that a plan makes in it.

    A layer that is left as it is, or whose errors cost next to nothing, has the others' median.

    Args:
        priced: the model.
        plan: expects a KL of each group.
        fit: of the method; here every layer is fitted once, and nothing is learned.
        folder: where the prices of plans are kept; an interrupted measurement continues there.

    Raises:
        InputError: activations that are not finite, or a group that cannot be fitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_digest(plan)}.json"
    kept = kept_values(path) or {}
    fit = replace(fit, mix=None, learned_steps=0)
    seen = MeasuredStream(priced.model, priced.layers, priced.tokens, priced.workers)
    windows = priced.held_out[:, :_WINDOW_LENGTH]
    stream = LayerStream(priced.model, priced.layers, windows, batch_size=1)
    judged = LayerTrials(stream, priced.workers)
    for index, layer in enumerate(track(priced.layers, "prices of the layers")):
        wanted = [group for group in plan.layers[layer.name] if not group.is_unchanged]
        measure = bool(wanted) and layer.name not in kept
        moments = seen.advance(index, measure=measure)
        if measure:
            tensors = _fitted(priced, layer, wanted, moments, fit)
            with compressed_for_a_while(priced.model, wanted, tensors):
                cost = _Cost(sum(g.expected_kl or 0.0 for g in wanted), judged.divergence(index))
            kept[layer.name] = cost
            keep_values(path, kept)
        judged.advance(index)
    return _ratios([layer.name for layer in priced.layers], kept)


def _digest(plan: RankPlan) -> str:
    """Differs between plans that make other errors."""
    return hashlib.sha256(repr(plan.layers).encode()).hexdigest()[:16]


class _Cost(NamedTuple):
    """KL to the original that a layer's errors should have, and have, nats a token."""

    expected: float
    measured: float


def _ratios(names: Sequence[str], costs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Measured over expected of each layer; the median where that says nothing."""
    found = {
        name: measured / expected
        for name, (expected, measured) in costs.items()
        if expected > _LEAST_KL and measured > 0
    }
    usual = statistics.median(found.values()) if found else 1.0
    return {name: found.get(name, usual) for name in names}


def _fitted(
    priced: PricedModel,
    layer: Layer,
    wanted: Sequence[GroupPlan],
    moments: Mapping[str, Result[torch.Tensor]],
    fit: Fit,
) -> dict[str, torch.Tensor]:
    """What a checkpoint would store for the groups of a layer."""
    results = []
    for source in layer.groups:
        groups = [group for group in wanted if group.members[0] in source.members]
        if not groups:
            continue
        inputs = InputMoments(regular(moments[source.name].get()))
        for group in groups:
            weights = [priced.model.get_submodule(m).weight.detach() for m in group.members]
            known = priced.statistics.of(group.members)
            results.append(
                submit_fit(priced.workers, group, weights, inputs, known, fit, torch.float32)
            )
    return {name: tensor for result in results for name, tensor in result.get().tensors.items()}


@contextlib.contextmanager
def compressed_for_a_while(
    model: PreTrainedModel, groups: Sequence[GroupPlan], tensors: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Inside, some groups of a model are what `tensors` hold of them.

    Args:
        model: as it was afterwards.
        groups: that change.
        tensors: as a checkpoint stores them.
    """
    before = {m: model.get_submodule(m) for group in groups for m in group.members}
    try:
        install_(model, plan_entries(groups), tensors)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
