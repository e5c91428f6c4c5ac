"""What modules are given and what their outputs are worth, seen by hooks while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.calibrate.moments import OutputMoments
from pipeline.errors import InputError

# Positional and keyword arguments of one call of a module.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Watcher(Protocol):
    """Sees what passes through linears that read the same input, forward and back.

    Attributes:
        members: names of the linears.
    """

    members: tuple[str, ...]

    def see_input(self, inputs: torch.Tensor) -> None:
        """Of all of them, float [..., n]; ValueError for values that are not finite."""
        ...

    def see_gradient(self, name: str, gradients: torch.Tensor, /) -> None:
        """By what one of them returned, float [..., m]; ValueError likewise."""
        ...


class _Reached(Exception):
    """Ends a forward pass as soon as what was wanted is known."""


@contextmanager
def stopping_at(module: nn.Module) -> Iterator[list[Call]]:
    """End the forward pass inside at `module`; the list gets what it was called with."""
    caught: list[Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Reached

    hook = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield caught
    except _Reached:
        pass
    finally:
        hook.remove()


@contextmanager
def stopping_behind(module: nn.Module) -> Iterator[list[Any]]:
    """End the forward pass inside behind `module`; the list gets what it returned."""
    caught: list[Any] = []

    def catch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        caught.append(output)
        raise _Reached

    hook = module.register_forward_hook(catch)
    try:
        yield caught
    except _Reached:
        pass
    finally:
        hook.remove()


@contextmanager
def seeing_inputs(
    model: nn.Module, takers: Mapping[str, Callable[[torch.Tensor], object]]
) -> Iterator[None]:
    """Give each named linear's input to its taker, float [..., n], whenever it is called inside.

    Raises:
        InputError: a taker's ValueError, for values that are not finite; names the linear.
    """
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(_giving_input(name, take))
        for name, take in takers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients by parameters inside: those by activations alone are wanted."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def seeing_gradients(model: nn.Module, groups: Mapping[str, Watcher]) -> Iterator[None]:
    """Let the sums see all that passes through their linears, forward and back.

    Parameters are frozen meanwhile: gradients by them are not wanted.

    Raises:
        InputError: values that are not finite; names the linear.
    """
    with ExitStack() as hooks:
        hooks.enter_context(seeing_inputs(model, {n: s.see_input for n, s in groups.items()}))
        for sums in groups.values():
            for member in sums.members:
                hook = _watching_output(member, sums)
                hooks.enter_context(model.get_submodule(member).register_forward_hook(hook))
        hooks.enter_context(frozen(model))
        yield


@contextmanager
def seeing_outputs(
    model: nn.Module,
    takers: Mapping[str, tuple[OutputMoments, Callable[[torch.Tensor], torch.Tensor]]],
) -> Iterator[None]:
    """Show `OutputMoments` what modules return, and the gradients by it.

    Args:
        model: its parameters are frozen meanwhile.
        takers: module -> its moments, and how what it returns is read as [..., n].

    Raises:
        InputError: values that are not finite; names the module.
    """
    with ExitStack() as hooks:
        for name, (moments, read) in takers.items():
            hook = _seeing_output(name, moments, read)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        hooks.enter_context(frozen(model))
        yield


def _seeing_output(
    name: str, moments: OutputMoments, read: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    def see(gradient: torch.Tensor) -> None:
        try:
            moments.see_gradient(read(gradient))
        except ValueError as error:
            raise not_finite(name, error) from error

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        try:
            moments.see_output(read(output))
        except ValueError as error:
            raise not_finite(name, error) from error
        if output.requires_grad:
            output.register_hook(see)

    return watch


def _giving_input(name: str, take: Callable[[torch.Tensor], object]) -> Any:
    def give(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        try:
            take(args[0])
        except ValueError as error:
            raise not_finite(name, error) from error

    return give


def _watching_output(member: str, sums: Watcher) -> Any:
    def see(gradient: torch.Tensor) -> None:
        try:
            sums.see_gradient(member, gradient)
        except ValueError as error:
            raise not_finite(member, error) from error

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.register_hook(see)

    return watch


def not_finite(where: str, observed: object) -> InputError:
    """The error for values that are not finite, at a linear or in a layer."""
    return InputError(
        "The model's activations or gradients are not finite.",
        where=where,
        observed=str(observed),
        change="load the model in float32, and check its weights",
    )
