"""Palu's ranks, as published: uniform, or in proportion to the Fisher information of the weights.

Chang et al., "Palu: Compressing KV-Cache with Low-Rank Projection", ICLR 2025, section 3.3. The
Fisher information of a matrix is the mean over its entries of the root mean square, over the
calibration texts, of the gradient of the loss by it; the loss is that of the text itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.compress.cache.cache_plan import CachePlan, SidePlan
from pipeline.compress.cache.latent_basis import kept_bytes
from pipeline.errors import InputError
from pipeline.model.cache_structure import CachedSide
from pipeline.progress import track


def fisher_of_weights(
    model: PreTrainedModel, structure: Sequence[CachedSide], tokens: torch.Tensor
) -> dict[str, float]:
    """Source -> Fisher information of its matrix, over texts that are read one by one.

    Args:
        model: a decoder in float32; it is not changed.
        structure: what it caches.
        tokens: int64 [N, T].

    Raises:
        InputError: keys or values that no linear layer gives, as behind a norm.
    """
    linears = {side.source: model.get_submodule(side.source) for side in structure}
    for name, module in linears.items():
        if not isinstance(module, nn.Linear):
            raise InputError(
                "Palu's ranks are those of the matrices that give keys and values.",
                where=name,
                observed=type(module).__name__,
                expected="nn.Linear",
                change="choose another method for the cache",
            )
    squares = {name: torch.zeros_like(module.weight) for name, module in linears.items()}
    with _only_these_learn(model, [module.weight for module in linears.values()]):
        for text in track(list(tokens), "Fisher information"):
            logits = model(input_ids=text[None], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[0, :-1].float(), text[1:])
            weights = [module.weight for module in linears.values()]
            for name, gradient in zip(linears, torch.autograd.grad(loss, weights), strict=True):
                squares[name] += gradient.square()
    return {name: float((s / len(tokens)).sqrt().mean()) for name, s in squares.items()}


@contextmanager
def _only_these_learn(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    wanted = {id(weight) for weight in weights}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, was in before:
            parameter.requires_grad_(was)


def proportional_ranks(shares: np.ndarray, full: int, total: int) -> np.ndarray:
    """Ranks in proportion to shares, at most `full` each, that sum to `total`.

    What the full ones cannot take goes to the others one by one, the smallest remainder first.

    Args:
        shares: what each matrix is worth, float [K].
        full: largest rank.
        total: sum of all ranks; at most K * full.
    """
    wanted = total * shares / shares.sum()
    ranks = np.minimum(np.floor(wanted).astype(int), full)
    order = np.argsort(wanted - ranks, kind="stable")
    left = total - int(ranks.sum())
    while left > 0:
        for place in order:
            if left and ranks[place] < full:
                ranks[place] += 1
                left -= 1
    return ranks


def palu_plan(
    structure: Sequence[CachedSide],
    kept: float,
    groups: int,
    *,
    fisher: Mapping[str, float] | None = None,
    bits: int | None = None,
    multiple: int = 1,
) -> CachePlan:
    """Palu's plan: a rank for every matrix, divided evenly among its groups of heads.

    Args:
        structure: what the model caches.
        kept: fraction of all ranks, in (0, 1].
        groups: groups that the heads of a layer are divided into.
        fisher: source -> what its matrix is worth; None for the same fraction of each.
        bits: of the latents; None for float16.
        multiple: ranks are rounded to the nearest multiple; Palu's code has 32.
    """
    full = max(side.numbers for side in structure)
    if fisher is None:
        ranks = np.array([side.numbers * kept for side in structure])
    else:
        shares = np.array([fisher[side.source] for side in structure])
        ranks = proportional_ranks(shares, full, math.floor(kept * full * len(structure)))
    sides = []
    for side, rank in zip(structure, ranks, strict=True):
        own = max(1, round(float(rank) / groups / multiple)) * multiple
        own = min(own, side.numbers // groups)
        # A latent that is no smaller than what it stands for is not worth its maps.
        if bits is None and kept_bytes(own, None, groups) >= 2 * side.numbers:
            sides.append(SidePlan.full(side))
            continue
        sides.append(SidePlan.latent(side, groups, own, bits))
    return CachePlan(tuple(sides))
