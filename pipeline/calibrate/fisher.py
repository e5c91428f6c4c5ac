"""How much the model's own output minds an error at each linear layer: one sweep back.

For y = W x, g is the gradient of log p(t) by y, with t drawn from the model's own distribution:
E[g g^T] is then the Fisher information of y, and half of E (g . d)^2 is the KL, in nats, that a
small error d costs. No label, and no text but the calibration tokens, is needed.

A sweep forward keeps the input of every layer on disk; the sweep back recomputes one layer at a
time from it, so that memory does not grow with depth.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from pipeline.artefact import damaged
from pipeline.calibrate.hooks import not_finite, seeing_gradients
from pipeline.calibrate.layer_carrier import LayerCarrier
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.moments import GroupMoments, SeenGroup
from pipeline.calibrate.precision import fast_products, quick_float32
from pipeline.kept_tensors import keep_tensors, kept_tensors
from pipeline.model.structure import Layer, hidden_states_of
from pipeline.progress import track
from pipeline.workers.workers import IN_PROCESS, Workers


class BackwardSweep:
    """Gradients of a model's log-likelihood, carried from its last layer to its first.

    Args:
        model: a decoder in evaluation mode; its parameters are not changed.
        layers: its layers, as `decoder_structure` found them.
        tokens: int64 [N, T].
        folder: for the inputs of the layers and the gradient; an interrupted sweep continues there.
        seed: of the tokens that are drawn from the model's distribution.
        batch_size: sequences that go through a layer at once.
        workers: who runs the layers for `forward` and `seen`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        tokens: torch.Tensor,
        folder: Path,
        *,
        seed: int = 0,
        batch_size: int = 2,
        workers: Workers = IN_PROCESS,
    ) -> None:
        self.model, self.layers, self.folder, self.seed = model, layers, folder, seed
        self.stream = LayerStream(model, layers, tokens, batch_size)
        self._carrier = LayerCarrier.of(self.stream, workers)
        folder.mkdir(parents=True, exist_ok=True)

    def forward(self, last: int | None = None) -> int:
        """Keep the input of every layer, and the gradient by the output of the last.

        Args:
            last: highest layer that is wanted, where an interrupted sweep may stand; None for the
                last layer of the model.

        Returns:
            The layer to go back from: `last` if what it needs is kept, else the last of the model.
        """
        end = len(self.layers) - 1
        last = end if last is None else last
        needed = [self._gradient_path(last + 1), *map(self._input_path, range(last + 1))]
        if all(kept_tensors(path) is not None for path in needed):
            return last
        for index in track(range(len(self.layers)), "sensitivity, forward"):
            _write(self._input_path(index), self.stream.hidden)
            self._advance(index)
            _require_finite(self.layers[index].name, self.stream.hidden)
        generator = torch.Generator().manual_seed(self.seed)
        gradients = [
            self._loss_gradient(batch, hidden, generator)
            for batch, hidden in track(
                list(zip(self.stream.batches, self.stream.hidden, strict=True)),
                "sensitivity, output",
            )
        ]
        _write(self._gradient_path(len(self.layers)), gradients)
        return end

    def _advance(self, index: int) -> None:
        if self._carrier is not None:
            self._carrier.advance(index)
            return
        with fast_products(self.model):
            self.stream.advance(index, measure=False)

    def seen(self, index: int) -> Iterator[tuple[str, SeenGroup]]:
        """As `backward`: each group of the layer, and its moments.

        By workers they are still being computed; by this process those of one group are made of
        its sums, which are then let go, when it is asked for.
        """
        if self._carrier is not None:
            inputs, gradients = self._kept(index)
            before, found = self._carrier.back(index, inputs, gradients)
            self._keep(index, before)
            yield from found.items()
            return
        moments = self.backward(index)
        for name in list(moments):
            yield name, moments.pop(name).seen()

    def backward(self, index: int) -> dict[str, GroupMoments]:
        """Carry the gradient from the output of layer `index` to its input.

        Call with the last layer first. What is needed to call again, after an interruption, stays
        until `forget`.

        Returns:
            Group name -> its moments.

        Raises:
            InputError: activations or gradients that are not finite; names the layer.
        """
        layer = self.layers[index]
        moments = {
            group.name: GroupMoments(group.in_features, group.heights) for group in layer.groups
        }
        self.carry(index, seeing_gradients(self.model, moments))
        return moments

    def carry(self, index: int, watching: AbstractContextManager[None]) -> None:
        """Carry the gradient through layer `index` while something watches; as `backward`.

        Raises:
            InputError: activations or gradients that are not finite; names the layer.
        """
        inputs, gradients = self._kept(index)
        with watching:
            before = [
                self._through(index, hidden, gradient)
                for hidden, gradient in zip(inputs, gradients, strict=True)
            ]
        self._keep(index, before)

    def forget(self, index: int) -> None:
        """Remove what was needed to carry the gradient through layer `index`, which is finished."""
        self._input_path(index).unlink(missing_ok=True)
        self._gradient_path(index + 1).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove what the sweep kept on disk."""
        shutil.rmtree(self.folder)

    def _kept(self, index: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Inputs of a layer, and the gradient by its outputs, batch by batch."""
        return _read(self._input_path(index)), _read(self._gradient_path(index + 1))

    def _keep(self, index: int, gradients: list[torch.Tensor]) -> None:
        """Keep the gradient by the inputs of a layer."""
        _require_finite(self.layers[index].name, gradients)
        _write(self._gradient_path(index), gradients)

    def _through(self, index: int, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient by the input of a layer, from that by its output; both [B, T, H]."""
        module, keywords = self.stream.modules[index], self.stream.keywords[len(hidden)][index]
        hidden = hidden.requires_grad_()
        with torch.enable_grad(), fast_products(self.model):
            output = hidden_states_of(module(hidden, **keywords))
        with quick_float32():  # of the moments
            (before,) = torch.autograd.grad(output, hidden, gradient.to(output.dtype))
        return before

    def _loss_gradient(
        self, batch: torch.Tensor, hidden: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Gradient of the log-likelihood of drawn tokens by the last layer's output, [B, T, H].

        The model runs as it is with its layers taken out, so that whatever it does behind them
        (norm, head, soft cap) is in the gradient.
        """
        last = hidden.detach().clone().requires_grad_()
        output = self.stream.as_output(last)
        with contextlib.ExitStack() as patches:
            for module in self.stream.modules:
                patches.enter_context(patch.object(module, "forward", lambda *_, **__: output))
            with torch.enable_grad(), fast_products(self.model):
                logits = self.model(input_ids=batch, use_cache=False).logits
        residual = _drawn_minus_expected(logits.detach().float(), generator)
        (gradient,) = torch.autograd.grad(logits, last, residual.to(logits.dtype))
        _require_finite(self.layers[-1].name, [gradient])
        return gradient

    def _input_path(self, index: int) -> Path:
        return self.folder / f"input-{index}.safetensors"

    def _gradient_path(self, index: int) -> Path:
        return self.folder / f"gradient-{index}.safetensors"


def _drawn_minus_expected(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of log p(t) by the logits, t drawn from p: onehot(t) - p, float32 [..., V]."""
    shape = logits.shape
    chances = logits.reshape(-1, shape[-1]).softmax(dim=-1)
    level = torch.rand(len(chances), 1, generator=generator)
    drawn = torch.searchsorted(chances.cumsum(dim=-1), level).clamp_max(shape[-1] - 1)
    return chances.neg_().scatter_add_(1, drawn, torch.ones_like(level)).view(shape)


def _require_finite(layer: str, tensors: list[torch.Tensor]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise not_finite(layer, "NaN or infinite values")


def _write(path: Path, batches: list[torch.Tensor]) -> None:
    """Keep batches, rounded to bfloat16: sensitivities need its range, not more digits."""
    keep_tensors(path, {str(i): b.bfloat16().contiguous() for i, b in enumerate(batches)})


def _read(path: Path) -> list[torch.Tensor]:
    tensors, _ = kept_tensors(path) or ({}, {})
    if not tensors:
        raise damaged(path, "not what was written")
    return [tensors[str(i)].float() for i in range(len(tensors))]
