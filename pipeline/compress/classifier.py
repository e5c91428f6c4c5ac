"""Ways through the layers of an image classifier, leaving each of them factored."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate.layer_stream import not_finite
from pipeline.calibrate.moments import SecondMoment
from pipeline.calibrate.whole_model import ImageSurvey
from pipeline.checkpoint.install import install_
from pipeline.compress.fit_group import Inputs, group_report
from pipeline.compress.plan.plan import GroupPlan
from pipeline.compress.walk import FactorOne, plan_entries
from pipeline.model.structure import Layer


class _Reached(Exception):
    """Ends a forward pass as soon as what was wanted is known."""


class OneShotWalk:
    """Every group is fitted to what it saw in the original model.

    Args:
        model: changed in place.
        survey: of the original.
    """

    def __init__(self, model: PreTrainedModel, survey: ImageSurvey) -> None:
        self.model, self.survey = model, survey

    def factor(
        self, index: int, planned: tuple[GroupPlan, ...], factor: FactorOne
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Factor and install layer `index`: tensors and reports."""
        tensors: dict[str, torch.Tensor] = {}
        reports = []
        inputs: dict[str, Inputs] = {}
        for group in planned:
            if group.is_unchanged:
                reports.append(group_report(group))
                continue
            source = self.survey.groups[group.members[0]].name
            if source not in inputs:
                inputs[source] = Inputs(self.survey.moment(group.members))
            new, report = factor(group, inputs[source])
            tensors |= new
            reports.append(report)
        install_(self.model, plan_entries(planned), tensors)
        return tensors, reports

    def repeat(
        self, index: int, planned: tuple[GroupPlan, ...], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Install what an earlier run made of layer `index`."""
        install_(self.model, plan_entries(planned), tensors)


class PropagatedWalk:
    """Each group is fitted to what the groups before it, already replaced, will feed it.

    Args:
        model: changed in place; a copy of it stays the original.
        layers: its structure, in the order in which they run.
        pixels: float32 [N, C, H, W].
        batch_size: images at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        pixels: torch.Tensor,
        batch_size: int = 16,
    ) -> None:
        self.model, self.layers = model, layers
        self.original = copy.deepcopy(model)
        self.batches = list(pixels.split(batch_size))

    def factor(
        self, index: int, planned: tuple[GroupPlan, ...], factor: FactorOne
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Factor and install layer `index`, group after group: tensors and reports."""
        layer = self.layers[index]
        tensors: dict[str, torch.Tensor] = {}
        reports = {group.members: group_report(group) for group in planned}
        given: list[tuple[_Given, _Given]] = []
        for source in layer.groups:
            wanted = [g for g in planned if g.members[0] in source.members and not g.is_unchanged]
            if not wanted:
                continue
            given = given or [self._given(layer.name, batch) for batch in self.batches]
            inputs = self._measure(layer.name, source.name, given)
            for group in wanted:
                new, reports[group.members] = factor(group, inputs)
                install_(self.model, plan_entries((group,)), new)
                tensors |= new
        return tensors, [reports[group.members] for group in planned]

    def repeat(
        self, index: int, planned: tuple[GroupPlan, ...], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Install what an earlier run made of layer `index`."""
        install_(self.model, plan_entries(planned), tensors)

    @torch.no_grad()
    def _given(self, layer: str, batch: torch.Tensor) -> tuple[_Given, _Given]:
        """What the layer is called with in the original and in the compressed model."""
        pair = []
        for model in (self.original, self.model):
            caught: list[_Given] = []
            with _stopping_at(model.get_submodule(layer), caught):
                model(pixel_values=batch)
            pair.append(caught[0])
        return pair[0], pair[1]

    @torch.no_grad()
    def _measure(self, layer: str, group: str, given: list[tuple[_Given, _Given]]) -> Inputs:
        """Moments of the group's input x' in the compressed model, and of its distance from x.

        Raises:
            InputError: activations that are not finite.
        """
        width = self.original.get_submodule(group).in_features
        seen, drift = SecondMoment(width), torch.zeros(width, width, dtype=torch.float64)
        for original, compressed in given:
            x = _input_of(self.original, layer, group, original)
            own = _input_of(self.model, layer, group, compressed)
            try:
                seen.add_(own)
            except ValueError as error:
                raise not_finite(group, error) from error
            drift += (x - own).T @ own
        return Inputs(seen.mean(), drift / seen.tokens)


class _Given:
    """Arguments of one call of a module."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


def _input_of(model: PreTrainedModel, layer: str, linear: str, given: _Given) -> torch.Tensor:
    """What a linear reads when its layer is called so, float32 [tokens, n]."""
    caught: list[_Given] = []
    with _stopping_at(model.get_submodule(linear), caught):
        model.get_submodule(layer)(*given.args, **given.kwargs)
    x = caught[0].args[0]
    return x.reshape(-1, x.shape[-1]).float()


@contextmanager
def _stopping_at(module: nn.Module, caught: list[_Given]) -> Iterator[None]:
    """End the forward pass inside at `module`, and keep what it was called with."""

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_Given(args, kwargs))
        raise _Reached

    hook = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield
    except _Reached:
        pass
    finally:
        hook.remove()
