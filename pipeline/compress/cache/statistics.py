"""What every layer's keys and values look like, and how much the model's output minds errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.fisher import BackwardSweep
from pipeline.calibrate.hooks import seeing_outputs
from pipeline.calibrate.moments import OutputMoments
from pipeline.compress.factorize.second_moments import shrunk
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.model.cache_structure import CachedSide, tokens_of
from pipeline.model.structure import Layer
from pipeline.progress import track

# Of the sensitivities, which are estimated from few tokens.
_SHRINKAGE = 0.1
_PARTS = ("moment", "weighted", "mean", "sensitivity", "start")


@dataclass(frozen=True)
class CacheStatistics:
    """Of the keys or the values of one layer.

    Attributes:
        moment: E[(y - m)(y - m)^T], float64 [n, n].
        weighted: the same, with tokens weighted by what the output minds of them.
        mean: m, float64 [n].
        sensitivity: shrunk G = E[g g^T], float64 [n, n].
        start: mean of what the first token of a sequence has, float64 [n].
    """

    moment: torch.Tensor
    weighted: torch.Tensor
    mean: torch.Tensor
    sensitivity: torch.Tensor
    start: torch.Tensor

    def heads(self, first: int, last: int) -> CacheStatistics:
        """Those of some of the numbers, which lie side by side."""
        part = slice(first, last)
        return CacheStatistics(
            self.moment[part, part],
            self.weighted[part, part],
            self.mean[part],
            self.sensitivity[part, part],
            self.start[part],
        )


def measure_cache(
    model: PreTrainedModel,
    layers: list[Layer],
    sides: list[CachedSide],
    tokens: torch.Tensor,
    folder: Path,
    settings: dict[str, Any],
) -> dict[str, CacheStatistics]:
    """Sweep the model forward and back, with what is cached watched; kept in a folder.

    Args:
        model: a decoder in evaluation mode; it is not changed.
        layers: its structure.
        sides: what they cache.
        tokens: int64 [N, T].
        folder: where measurements are kept; an interrupted one continues there.
        settings: what they depend on, `seed` among it.

    Returns:
        Source -> its statistics.

    Raises:
        InputError: activations or gradients that are not finite, or other settings there.
    """
    finished = FinishedLayers(folder / "layers", settings | {"parts": list(_PARTS)})
    missing = [i for i, layer in enumerate(layers) if layer.name not in finished]
    if missing:
        sweep = BackwardSweep(model, layers, tokens, folder / "sweep", seed=settings["seed"])
        back = range(sweep.forward(missing[-1]), missing[0] - 1, -1)
        for index in track(back, "what is cached, backward"):
            own = [side for side in sides if side.layer == layers[index].name]
            moments = {side.source: (OutputMoments(side.numbers), _reader(side)) for side in own}
            sweep.carry(index, seeing_outputs(model, moments))
            if index in missing:
                kept = {name: _kept(found) for name, (found, _) in moments.items()}
                tensors = {f"{s}:{part}": t for s, parts in kept.items() for part, t in parts}
                finished.add(layers[index].name, tensors, [])
            sweep.forget(index)
        sweep.remove()
    found: dict[str, CacheStatistics] = {}
    for layer in layers:
        tensors, _ = finished.load(layer.name)
        for side in (side for side in sides if side.layer == layer.name):
            parts = {part: tensors[f"{side.source}:{part}"].double() for part in _PARTS}
            parts["sensitivity"] = shrunk(parts["sensitivity"], _SHRINKAGE)
            found[side.source] = CacheStatistics(**parts)
    return found


def _reader(side: CachedSide) -> Callable[[torch.Tensor], torch.Tensor]:
    """Turns what the source returns into [B, S, n]."""
    return partial(_read, heads=side.heads, width=side.width)


def _read(output: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    tokens = tokens_of(output, heads, width)
    assert tokens is not None, "the structure was read off outputs of this shape"
    return tokens


def _kept(moments: OutputMoments) -> list[tuple[str, torch.Tensor]]:
    moment, weighted, mean = moments.centred()
    found = (moment, weighted, mean.clone(), moments.gradients.mean(), moments.start())
    return list(zip(_PARTS, found, strict=True))
