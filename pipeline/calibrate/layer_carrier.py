"""Carry text through the layers of a decoder by workers, a task for each batch of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.carried_layer import (
    LayerCode,
    attention_heads,
    is_carried,
    layer_bytes,
    layer_gradients,
    layer_output,
    numbers_of,
)
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.moments import SeenGroup
from pipeline.calibrate.seen_rows import (
    mean_input_moment,
    mean_output_moment,
    mean_weighted_moment,
    moment_bytes,
)
from pipeline.model.structure import Group, Layer
from pipeline.progress import note
from pipeline.workers.workers import Result, Workers


class LayerCarrier:
    """Runs layers by workers, to the bytes of a `LayerStream`.

    Args:
        stream: whose batches are carried, and what its layers are given beside them.
        code: of the layers.
        workers: who runs them.
    """

    def __init__(self, stream: LayerStream, code: LayerCode, workers: Workers) -> None:
        self.stream, self.workers = stream, workers
        self._code = workers.share(code)

    @classmethod
    def of(
        cls, model: PreTrainedModel, stream: LayerStream, workers: Workers
    ) -> LayerCarrier | None:
        """None where this process has to run the layers itself, which it says if others could."""
        if not workers.at_once:
            return None
        code = LayerCode.of(model, [layer.name for layer in stream.layers])
        if code is None or not is_carried(list(stream.keywords.values())):
            note(
                "this process alone carries the text through the layers: class and config of "
                f"{type(model).__name__} do not say all of them"
            )
            return None
        return cls(stream, code, workers)

    def advance(self, index: int) -> None:
        """Run layer `index` on its inputs and keep its outputs in their place."""
        layer, numbers, keywords = self._given(index)
        heads = attention_heads(self.stream.model)
        found = [
            self.workers.submit(
                f"{layer.name}, forward",
                layer_output,
                self._code,
                layer.name,
                layer.groups,
                numbers,
                keywords[len(hidden)],
                hidden,
                needed_bytes=layer_bytes(layer.groups, hidden.shape, heads),
            )
            for hidden in self.stream.hidden
        ]
        for hidden, output in zip(self.stream.hidden, found, strict=True):
            hidden.copy_(output.get())

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
        layer, numbers, keywords = self._given(index)
        heads = attention_heads(self.stream.model)
        count = 1 + sum(2 + len(group.members) for group in layer.groups)
        parts = [
            self.workers.submit_parts(
                f"{layer.name}, back",
                layer_gradients,
                count,
                self._code,
                layer.name,
                layer.groups,
                numbers,
                keywords[len(hidden)],
                hidden,
                gradient,
                needed_bytes=layer_bytes(layer.groups, hidden.shape, heads, back=True),
            )
            for hidden, gradient in zip(inputs, gradients, strict=True)
        ]
        tokens = max(hidden.shape[0] * hidden.shape[1] for hidden in inputs)
        rows, start = {}, 1
        for group in layer.groups:
            stop = start + 2 + len(group.members)
            rows[group] = [batch[start:stop] for batch in parts]
            start = stop
        # The largest first: what is left at the end keeps nobody waiting for long.
        seen = {
            group.name: self._summed(group, rows[group], tokens)
            for group in sorted(rows, key=lambda g: -g.in_features - sum(g.out_features))
        }
        return [batch[0].get() for batch in parts], seen

    def _summed(
        self, group: Group, batches: Sequence[Sequence[Result[torch.Tensor]]], tokens: int
    ) -> SeenGroup:
        """Sums over all batches of what was seen of a group, being computed."""
        rows, weights, *outputs = zip(*batches, strict=True)
        where, width = ", ".join(group.members), group.in_features
        needed_bytes = moment_bytes(width, tokens)
        return SeenGroup(
            self.workers.submit(
                f"inputs of {where}", mean_input_moment, *rows, needed_bytes=needed_bytes
            ),
            self.workers.submit(
                f"weighted inputs of {where}",
                mean_weighted_moment,
                *rows,
                *weights,
                needed_bytes=needed_bytes,
            ),
            tuple(
                self.workers.submit(
                    f"outputs of {member}",
                    mean_output_moment,
                    *found,
                    needed_bytes=moment_bytes(height, tokens),
                )
                for member, height, found in zip(
                    group.members, group.out_features, outputs, strict=True
                )
            ),
        )

    def _given(self, index: int) -> tuple[Layer, Result[Any], dict[int, Result[Any]]]:
        """A layer, its numbers, and what it is given beside so many sequences; both shared."""
        keywords = {n: self.workers.share(k[index]) for n, k in self.stream.keywords.items()}
        numbers = self.workers.share(numbers_of(self.stream.modules[index]))
        return self.stream.layers[index], numbers, keywords
