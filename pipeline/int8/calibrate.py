"""What the tensors of a network hold, seen over batches of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.errors import InputError, UsageError
from pipeline.int8.grids import ActivationGrid
from pipeline.int8.ranges import OBSERVERS, Observer
from pipeline.int8.runtimes import Int8Runtime
from pipeline.int8.structure import ConvStructure


def observe(
    model: nn.Module, structure: ConvStructure, batches: Sequence[torch.Tensor]
) -> dict[int, Observer]:
    """Run batches twice: for the extremes of every tensor, and for its histogram.

    Args:
        model: never rounded; in evaluation mode.
        structure: of it.
        batches: what it is called with.

    Returns:
        What was seen of each grid's tensors, by the number of the grid.

    Raises:
        InputError: no batch, or numbers that are not finite.
    """
    if not len(batches):
        raise InputError("There is nothing to calibrate on.", observed="no batch")
    seen: dict[int, Observer] = {}
    for name, site in structure.convs.items():
        seen.setdefault(site.reads, Observer(f"what {name} reads"))
    for take in (Observer.see, Observer.count):
        with _watching(model, structure, seen, take), torch.no_grad():
            for batch in batches:
                model(batch)
    return seen


@contextmanager
def _watching(
    model: nn.Module,
    structure: ConvStructure,
    seen: dict[int, Observer],
    take: Callable[[Observer, torch.Tensor], None],
) -> Iterator[None]:
    """Inside, observers are given what convolutions read, and what is rounded where it arises."""

    def reader(number: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: take(seen[number], inputs[0])

    def giver(number: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: take(seen[number], output)

    given = dict(structure.activations)
    handles = []
    for name, site in structure.convs.items():
        if site.source not in given:  # it sees the same
            hook = reader(site.reads)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        if site.gives is not None:
            given[site.norm or name] = site.gives
    for name, number in given.items():
        handles.append(model.get_submodule(name).register_forward_hook(giver(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activation_grids(
    seen: dict[int, Observer], runtime: Int8Runtime, observer: str = "mse", bits: int = 8
) -> dict[int, ActivationGrid]:
    """The grid of every tensor, by its number.

    Args:
        seen: as `observe` has it.
        runtime: what it takes.
        observer: how a range is chosen: a name in `OBSERVERS`.
        bits: of a code.

    Raises:
        UsageError: no such observer.
    """
    if observer not in OBSERVERS:
        raise UsageError(
            "There is no such way to choose a range.",
            where="--observer",
            observed=observer,
            expected=" or ".join(OBSERVERS),
        )
    choose, codes = OBSERVERS[observer], runtime.codes(bits)
    return {n: choose(what, codes, runtime.symmetric) for n, what in seen.items()}
