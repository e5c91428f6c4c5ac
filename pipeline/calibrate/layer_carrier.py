"""Carry text through the layers of a decoder by workers, a task for each batch of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pipeline.calibrate.carried_layer import (
    LayerCode,
    is_carried,
    layer_bytes,
    layer_gradients,
    layer_inputs,
    layer_output,
    linear_input,
)
from pipeline.calibrate.carried_module import numbers_of
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.moments import SeenGroup
from pipeline.calibrate.seen_rows import (
    mean_drift,
    mean_input_moment,
    mean_output_moment,
    mean_weighted_moment,
    moment_bytes,
)
from pipeline.errors import PipelineError
from pipeline.model.structure import Group
from pipeline.progress import note
from pipeline.workers.workers import Result, Workers

_Rows = Sequence[Result[torch.Tensor]]


class LayerCarrier:
    """Runs layers by workers, to the bytes of a `LayerStream` under `fast_products`.

    Args:
        stream: whose batches are carried, and what its layers are given beside them.
        workers: who runs them.
    """

    def __init__(self, stream: LayerStream, workers: Workers) -> None:
        self.stream, self.workers = stream, workers
        self._tokens = max(batch.numel() for batch in stream.batches)

    @classmethod
    def of(cls, stream: LayerStream, workers: Workers) -> LayerCarrier | None:
        """None where this process has to run the layers itself, which it says if others could."""
        if not workers.at_once:
            return None
        codes = [LayerCode.of(stream.model, layer.name) for layer in stream.layers]
        if None in codes or not is_carried(list(stream.keywords.values())):
            note(
                "this process alone carries the text through the layers: those of "
                f"{type(stream.model).__name__} cannot be made by workers"
            )
            return None
        return cls(stream, workers)

    def advance(self, index: int) -> None:
        """Run layer `index` on the stream's hidden states, in their place."""
        self.run_(index, self.stream.hidden)

    def run_(self, index: int, batches: Sequence[torch.Tensor]) -> None:
        """Run layer `index` on batches of hidden states, in their place."""
        tasks = self._each(index, "forward", layer_output, batches)
        _take_(batches, [self.workers.submit(*task, needed_bytes=size) for task, size in tasks])

    def advance_seeing(
        self, index: int, groups: Sequence[Group], dtype: torch.dtype
    ) -> dict[str, list[Result[torch.Tensor]]]:
        """As `advance`; what groups of the layer read of each batch, of this type [t, n].

        Raises:
            InputError: activations that are not finite; names the linear.
        """
        hidden = self.stream.hidden
        parts = [
            self.workers.submit_parts(
                *task[:2], 1 + len(groups), *task[2:], dtype, needed_bytes=size
            )
            for task, size in self._each(index, "forward", layer_inputs, hidden, groups)
        ]
        _take_(hidden, [batch[0] for batch in parts])
        return {g.name: [batch[1 + at] for batch in parts] for at, g in enumerate(groups)}

    def inputs_of(self, index: int, linear: str, batches: Sequence[torch.Tensor]) -> _Rows:
        """What one linear of layer `index` reads of batches of hidden states, float32 [t, n]."""
        tasks = self._each(index, "forward", linear_input, batches)
        return [self.workers.submit(*task, linear, needed_bytes=size) for task, size in tasks]

    def moments(
        self, index: int, group: str, rows: _Rows, originals: _Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x' x'^T] and E[(x - x') x'^T] of batches of x' and of x, float32 [n, n].

        Of what a group of layer `index` reads.
        """
        groups = self.stream.layers[index].groups
        width = next(g.in_features for g in groups if g.name == group)
        drift = self._sum(f"drift of {group}", mean_drift, width, *originals, *rows)
        return self.input_moment(group, width, rows).get(), drift.get()

    def input_moment(self, where: str, width: int, rows: _Rows) -> Result[torch.Tensor]:
        """E[x x^T] of batches, float32 [n, n], being computed."""
        return self._sum(f"inputs of {where}", mean_input_moment, width, *rows)

    def back(
        self, index: int, inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], dict[str, SeenGroup]]:
        """Carry the gradient from the output of layer `index` to its input.

        Returns:
            The gradient by the inputs, batch by batch.
            Group name -> its moments, which are being computed; the largest group first.

        Raises:
            InputError: activations or gradients that are not finite; names the linear.
        """
        groups = self.stream.layers[index].groups
        count = 1 + sum(2 + len(group.members) for group in groups)
        tasks = self._each(index, "back", layer_gradients, inputs, back=True)
        parts = [
            self.workers.submit_parts(*task[:2], count, *task[2:], gradient, needed_bytes=size)
            for (task, size), gradient in zip(tasks, gradients, strict=True)
        ]
        rows, start = {}, 1
        for group in groups:
            stop = start + 2 + len(group.members)
            rows[group] = [batch[start:stop] for batch in parts]
            start = stop
        largest_first = self.stream.layers[index].largest_first
        seen = {group.name: self._summed(group, rows[group]) for group in largest_first}
        return [batch[0].get() for batch in parts], seen

    def _summed(self, group: Group, batches: Sequence[_Rows]) -> SeenGroup:
        """Sums over all batches of what was seen of a group, being computed."""
        rows, weights, *outputs = zip(*batches, strict=True)
        where, width = ", ".join(group.members), group.in_features
        members = zip(group.members, group.out_features, outputs, strict=True)
        return SeenGroup(
            self.input_moment(where, width, rows),
            self._sum(f"weighted inputs of {where}", mean_weighted_moment, width, *rows, *weights),
            tuple(
                self._sum(f"outputs of {member}", mean_output_moment, height, *found)
                for member, height, found in members
            ),
        )

    def _sum(
        self, where: str, function: Callable[..., torch.Tensor], width: int, *rows: Any
    ) -> Result[torch.Tensor]:
        needed_bytes = moment_bytes(width, self._tokens)
        return self.workers.submit(where, function, *rows, needed_bytes=needed_bytes)

    def _each(
        self,
        index: int,
        way: str,
        function: Callable[..., Any],
        batches: Sequence[torch.Tensor],
        groups: Sequence[Group] | None = None,
        *,
        back: bool = False,
    ) -> Iterator[tuple[tuple[Any, ...], int]]:
        """Arguments of a task for each batch of what goes through a layer, and its memory."""
        layer = self.stream.layers[index]
        code = LayerCode.of(self.stream.model, layer.name)
        if code is None:
            raise PipelineError("A changed layer cannot be made by workers.", where=layer.name)
        shared = self.workers.share(code)
        numbers = self.workers.share(numbers_of(self.stream.modules[index]))
        keywords = {n: self.workers.share(k[index]) for n, k in self.stream.keywords.items()}
        groups = layer.groups if groups is None else tuple(groups)
        for hidden in batches:
            given = (shared, groups, numbers, keywords[len(hidden)], hidden)
            size = layer_bytes(layer.groups, hidden.shape, code.heads, back=back)
            yield (f"{layer.name}, {way}", function, *given), size


def _take_(batches: Sequence[torch.Tensor], found: Sequence[Result[torch.Tensor]]) -> None:
    for hidden, output in zip(batches, found, strict=True):
        hidden.copy_(output.get())
