"""Learn the rounding of a layer's matrices against what the layer should return.

A layer is quantised matrix by matrix, each with its own inputs and its own errors in view. Then
its scales are learned, all together, and after them its codes, on what the compressed model feeds
it, against what the original's layer returns for the same text (MLoRQ's last stage; AutoRound:
Cheng et al. 2024). What does not lower the error of text that was not learned from is taken back.

An error e of what the layer returns costs e^T G e / 2, G as the survey has it of the last matrix
that adds to the residual stream; without one, or where that matrix does not add to it as it is, its
square. The norm that comes next divides by the size of its token, so errors count relative to it.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate.hooks import frozen
from pipeline.calibrate.paired_stream import PairedStream
from pipeline.checkpoint.modeling_quantized import QuantizedWeight
from pipeline.compress.plan.layer_costs import GroupStatistics
from pipeline.quantize.groupwise import Blocks
from pipeline.quantize.learned_rounding import LearnedBlocks, descent, scaled
from pipeline.training_state import TrainingState, take_steps_

_TOKENS_A_STEP = 1024
# Of the sequences, kept apart: what was learned stays only where it lowers the error of these.
_HELD_OUT = 1 / 16
# Scales first, on which the error depends smoothly; then codes.
_KINDS = ("stretches", "moves")
# How far a scale can be stretched, or a code moved in steps of its grid, in all steps together.
_TRAVEL = 0.1
# Of a change that a linear makes: what the layer makes of it may differ by so much.
_SAME = 1e-2


@dataclass(frozen=True)
class Learning:
    """How much is learned, and where a layer's unfinished state is kept.

    Attributes:
        steps: of each layer.
        folder: None for a run that is not taken up again.
    """

    steps: int
    folder: Path | None


def learn_rounding_(
    stream: PairedStream,
    index: int,
    codes: Mapping[str, Blocks],
    learning: Learning,
    statistics: GroupStatistics | None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Learn codes and scales of a layer that is quantised, in place.

    Args:
        stream: has entered the layer, whose quantised matrices are installed.
        index: of the layer.
        codes: of its quantised matrices, by the module that holds them.
        learning: how.
        statistics: of its outputs; None weighs all alike.

    Returns:
        The tensors that the checkpoint stores for them, and the error of the layer on text that
        was not learned from, before and after.

    Raises:
        InputError: an error that is not finite.
    """
    model, layer = stream.model, stream.layers[index]
    matrices = {name: _matrix(model, name) for name in codes}
    error = _LayerError.of(stream, index, statistics)
    before = error.held_out()
    if before == 0:
        return {}, {"layer_error_rounded": 0.0, "layer_error_learned": 0.0}
    learned = {name: LearnedBlocks(blocks) for name, blocks in codes.items()}
    best, least = dict(codes), before
    with contextlib.ExitStack() as stack:
        folder = learning.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = {kind: folder / f"{layer.name}.{kind}.safetensors" for kind in _KINDS}
        for kind, path in paths.items():
            parameters = {f"{name}.{kind}": getattr(made, kind) for name, made in learned.items()}
            with frozen(model.get_submodule(layer.name)), _computing_with(matrices, learned):
                _learn_(error, before, parameters, learning.steps // len(_KINDS), path)
            found = {name: made.blocks() for name, made in learned.items()}
            _installed(matrices, found)
            if (now := error.held_out()) < least:
                best, least = found, now
            else:
                _take_back_(parameters)
        for path in paths.values():
            path.unlink(missing_ok=True)
    return _installed(matrices, best), {"layer_error_rounded": before, "layer_error_learned": least}


@torch.no_grad()
def _take_back_(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.zero_()


def _matrix(model: PreTrainedModel, name: str) -> QuantizedWeight:
    module = model.get_submodule(name)
    assert isinstance(module, QuantizedWeight)
    return module


def _installed(
    matrices: dict[str, QuantizedWeight], codes: Mapping[str, Blocks]
) -> dict[str, torch.Tensor]:
    """Give quantised matrices other codes of the same format; the tensors that are stored."""
    tensors = {}
    for name, matrix in matrices.items():
        for part, tensor in codes[name].stored_tensors().items():
            tensors[f"{name}.{part}"] = tensor.contiguous()
            setattr(matrix, part, tensors[f"{name}.{part}"])
        matrix._held = None
    return tensors


@contextlib.contextmanager
def _computing_with(
    matrices: dict[str, QuantizedWeight], learned: dict[str, LearnedBlocks]
) -> Iterator[None]:
    """Inside, the layer multiplies with what is learned, as it is at every call."""
    with contextlib.ExitStack() as patches:
        for name, matrix in matrices.items():
            made = learned[name]
            patches.enter_context(patch.object(matrix, "values", _values_of(made)))
        yield


def _values_of(made: LearnedBlocks) -> Callable[[torch.dtype], torch.Tensor]:
    return lambda dtype: made.values().to(dtype)


def _learn_(
    error: _LayerError, before: float, parameters: dict[str, nn.Parameter], steps: int, path: Path
) -> None:
    """Take all steps, or those that an interrupted run has not taken."""
    state = TrainingState(path, parameters, descent(parameters.values()))
    progress, peak = state.load_(), 2 * _TRAVEL / steps
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    take_steps_(
        state,
        progress,
        steps,
        lambda step: scaled(error.at_step(step), before, parameters.values()),
        lambda step: peak * (1 - step / steps),
        math.inf,
        "learn the rounding",
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    # What comes next starts from it, in a run that is interrupted then as well.
    state.save(progress)


class _LayerError:
    """What a layer returns in the compressed model, against what it returns in the original.

    Args:
        stream: has entered the layer.
        index: of the layer.
        root: L with G = L L^T, float32 [H, H]; None for the identity.
    """

    def __init__(self, stream: PairedStream, index: int, root: torch.Tensor | None) -> None:
        self.stream, self.index, self.root = stream, index, root
        length = stream.compressed[0].shape[1]
        sequences = sum(map(len, stream.compressed))
        # A power of two, so that whole batches are filled.
        most = max(1, min(_TOKENS_A_STEP // length, stream.original.batch_size, sequences // 2))
        self.count = 2 ** int(math.log2(most))
        firsts = list(range(0, sequences - self.count + 1, self.count))
        apart = max(1, round(_HELD_OUT * len(firsts)))
        self.firsts, self.apart = firsts[: len(firsts) - apart], firsts[len(firsts) - apart :]

    @classmethod
    def of(
        cls, stream: PairedStream, index: int, statistics: GroupStatistics | None
    ) -> _LayerError:
        """Weighed by the sensitivity of the layer's output, where it is known."""
        layer = stream.layers[index]
        width = stream.compressed[0].shape[-1]
        last = next((g for g in reversed(layer.groups) if g.out_features == (width,)), None)
        plain = cls(stream, index, None)
        if statistics is None or last is None or not plain.is_added(last.name):
            return plain
        (sensitivity,) = statistics.of(last.members).sensitivities()
        return cls(stream, index, torch.linalg.cholesky(sensitivity.double()).float())

    @torch.no_grad()
    def is_added(self, name: str) -> bool:
        """Whether the layer returns what a linear does, plus other things, up to a factor."""
        linear, (first, *_) = self.stream.model.get_submodule(name), self.apart
        before, _ = self.stream.through(self.index, first, 1)
        probe = torch.linspace(-1, 1, before.shape[-1])
        hook = linear.register_forward_hook(lambda module, args, output: output + probe)
        try:
            change = self.stream.through(self.index, first, 1)[0] - before
        finally:
            hook.remove()
        factor = (change @ probe / (probe @ probe)).mean()
        return bool((change - factor * probe).norm() <= _SAME * change.norm())

    def at_step(self, step: int) -> torch.Tensor:
        """The error of a step's sequences, each seen once before any is seen again."""
        lap, place = divmod(step, len(self.firsts))
        generator = torch.Generator().manual_seed(lap)
        order = torch.randperm(len(self.firsts), generator=generator)
        return self._of(self.firsts[int(order[place])])

    @torch.no_grad()
    def held_out(self) -> float:
        """The error of the sequences that are not learned from."""
        return float(torch.stack([self._of(first) for first in self.apart]).mean())

    def _of(self, first: int) -> torch.Tensor:
        found, wanted = self.stream.through(self.index, first, self.count)
        error = found - wanted if self.root is None else (found - wanted) @ self.root
        weights = 1 / wanted.square().mean(-1).clamp_min(1e-30)
        return (error.square().sum(-1) * weights).mean() / weights.mean() / 2
