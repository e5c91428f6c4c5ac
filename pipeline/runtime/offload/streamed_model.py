"""A transformers model of which some layers have no memory of their own.

Before a layer runs, its numbers are put where it looks for them: by the host, from a buffer that
was read from disk, or by a GPU's own copies. All else is transformers' code as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import InputError, ResourceError
from pipeline.model.structure import layer_list
from pipeline.progress import track
from pipeline.runtime.offload.side_by_side import ModelCall, run_side_by_side
from pipeline.runtime.offload.traffic import Traffic


class LayerWeights(Protocol):
    """The numbers of a model's layers, which are entered in their order, again and again."""

    def enter(self, number: int) -> None:
        """Put a layer's numbers where it looks for them, until the next one is entered."""

    def end_pass(self) -> None:
        """Let go of the layer that was entered last."""

    def restart(self) -> None:
        """Let the next layer be the first again, whatever went wrong."""

    def traffic(self, passes: int) -> Traffic:
        """What was moved so far in so many calls, and what is held."""

    def close(self) -> None:
        """Give back what is no memory of Python's."""


class StreamedModel:
    """A causal language model whose layers' numbers come and go.

    Args:
        model: with steady attention, without gradients.
        weights: of its layers.

    Attributes:
        model: called by `run`.

    Raises:
        InputError: no list of layers is found.
    """

    def __init__(self, model: PreTrainedModel, weights: LayerWeights) -> None:
        self.model, self._weights = model, weights
        self._path, layers = layer_list(model)
        self._count = len(layers)
        self._next: int | None = None
        self._by_layers = False  # whether each layer runs several calls before the next
        self._beside: tuple[Any, ...] | None = None
        self._steps: Iterator[int] = iter(())
        self._passes = 0
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, number))
        layers[0].register_forward_hook(self._remember_form)

    @property
    def traffic(self) -> Traffic:
        """What was moved so far, and what is held."""
        return self._weights.traffic(self._passes)

    def run(self, calls: Sequence[ModelCall], shown: str | None = None) -> list[torch.Tensor]:
        """Logits of each call, float32 [1, S, V], by one pass over the layers.

        What fails in it leaves the next pass as it would be.

        Args:
            calls: of which each has the bits that it has alone.
            shown: what they are for, to be said beside the layers that are done.

        Raises:
            InputError: the weights cannot be read, or hold what is no number.
            ResourceError: a GPU's memory does not hold what is computed.
        """
        self._next = 0
        if shown is not None:
            self._steps = iter(track(range(self._count), shown))
        try:
            found = self._run(calls, self._enter)
            self._finish_pass()
        except BaseException as error:
            self._weights.restart()
            if isinstance(error, torch.OutOfMemoryError):
                raise out_of_gpu_memory(error) from error
            raise
        finally:
            self._next, self._steps = None, iter(())
        return found

    def _run(self, calls: Sequence[ModelCall], enter: Callable[[int], None]) -> list[torch.Tensor]:
        if len(calls) == 1:
            return [calls[0].run(self.model)]
        layers = list(self.model.get_submodule(self._path).children())
        self._by_layers = True
        try:
            return run_side_by_side(self.model, layers, calls, enter, self._beside)
        finally:
            self._by_layers = False

    @contextlib.contextmanager
    def first_layer_alone(self) -> Iterator[Callable[[Sequence[ModelCall]], list[torch.Tensor]]]:
        """`run` with no layer but the first, which is read once: to try things with."""
        parent, _, name = self._path.rpartition(".")
        owner = self.model.get_submodule(parent)
        layers: nn.ModuleList = getattr(owner, name)
        self._weights.enter(0)
        setattr(owner, name, layers[:1])
        try:
            yield lambda calls: self._run(calls, lambda number: None)
        finally:
            setattr(owner, name, layers)
            self._weights.restart()

    def close(self) -> None:
        """End what reads and copies, and close the files."""
        self._weights.close()

    def _finish_pass(self) -> None:
        next(self._steps, None)
        if self._next != self._count:
            raise self._unchained(self._next)
        self._weights.end_pass()
        self._passes += 1

    # --- layers ---

    def _before(self, number: int, module: nn.Module, given: Any) -> None:
        """Put a layer's numbers where it looks for them; nothing where that was seen to."""
        if self._next is not None and not self._by_layers:
            self._enter(number)

    def _remember_form(self, module: nn.Module, given: Any, returned: Any) -> None:
        if not self._by_layers:
            self._beside = returned[1:] if isinstance(returned, tuple) else None

    def _enter(self, number: int) -> None:
        """Put the next layer's numbers where it looks for them."""
        if number != self._next:
            raise self._unchained(number)
        self._next = number + 1
        next(self._steps, None)
        self._weights.enter(number)

    def _unchained(self, number: int | None) -> InputError:
        return InputError(
            "This model does not run its layers once each, one after the other.",
            where=self.model.config.name_or_path or type(self.model).__name__,
            observed=f"layer {number} out of turn",
        )


def out_of_gpu_memory(error: Exception) -> ResourceError:
    """What PyTorch's error says to a user."""
    return ResourceError(
        "The GPU does not have the memory that the budget promises.",
        where="--vram",
        observed=str(error).splitlines()[0],
        change="close other programs that use the GPU, or give fewer bytes by --vram",
    )
