"""Palu's ranks, as published: uniform, or in proportion to the Fisher information of the weights.

Chang et al., "Palu: Compressing KV-Cache with Low-Rank Projection", ICLR 2025, section 3.3. The
Fisher information of a matrix is the mean over its entries of the root mean square, over the
calibration texts, of the gradient of the loss by it; the loss is that of the text itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.compress.cache.cache_plan import CachePlan, SidePlan
from pipeline.compress.cache.cache_search import CacheProblem
from pipeline.compress.cache.latent_basis import SCALE_BITS, kept_bytes
from pipeline.errors import InputError
from pipeline.model.cache_structure import CachedSide
from pipeline.progress import track


def _fisher_of_weights(
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


def _proportional_ranks(shares: np.ndarray, full: int, total: int) -> np.ndarray:
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


def allocate_by_fisher(problem: CacheProblem) -> CachePlan:
    """Palu's ranks, in proportion to the Fisher information of the matrices.

    Raises:
        InputError: keys or values that no linear layer gives.
    """
    fisher = _fisher_of_weights(problem.model, problem.structure, problem.tokens)
    shares = np.array([fisher[side.source] for side in problem.structure])
    full = max(side.numbers for side in problem.structure)
    total = math.floor(_kept_ranks(problem) * full * len(problem.structure))
    return _plan_of(problem, _proportional_ranks(shares, full, total))


def allocate_uniformly(problem: CacheProblem) -> CachePlan:
    """The same fraction of every rank."""
    kept = _kept_ranks(problem)
    return _plan_of(problem, np.array([math.floor(kept * s.numbers) for s in problem.structure]))


def _bits_of(problem: CacheProblem) -> int | None:
    """Palu rounds all latents alike: to float16, unless one number of bits is asked for."""
    return None if None in problem.bits else problem.bits[0]


def _kept_ranks(problem: CacheProblem) -> float:
    """Fraction of all ranks that the budget has bytes for, scales and offsets taken off."""
    bits, ranks = _bits_of(problem), sum(side.numbers for side in problem.structure)
    latents = problem.groups * len(problem.structure)
    scales_bytes = 0 if bits is None else latents * SCALE_BITS // 8
    left = problem.budget_bytes - scales_bytes - (latents if bits else 0)  # filled up to bytes
    return min(1.0, max(0.0, 8 * left / (bits or 16) / ranks))


def _plan_of(problem: CacheProblem, ranks: np.ndarray) -> CachePlan:
    """The plan in which each side has its rank, divided evenly among its groups."""
    groups, bits = problem.groups, _bits_of(problem)
    sides = []
    for side, rank in zip(problem.structure, ranks, strict=True):
        own = min(max(1, int(rank) // groups), side.numbers // groups)
        is_smaller = kept_bytes(own, bits, groups) < 2 * side.numbers
        sides.append(
            SidePlan.latent(side, groups, own, bits) if is_smaller else SidePlan.full(side)
        )
    return CachePlan(tuple(sides))
