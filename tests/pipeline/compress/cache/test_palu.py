"""Palu's ranks are those of its paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.compress.cache.cache_search import CacheProblem, bases_of
from pipeline.compress.cache.palu import (
    _proportional_ranks,
    allocate_by_fisher,
    allocate_uniformly,
)
from pipeline.compress.cache.statistics import CacheStatistics
from pipeline.errors import InputError
from pipeline.model.cache_structure import cache_structure
from pipeline.model.structure import decoder_structure
from tests.support.families import tiny_model


def problem_of(family: str, kept: float, bits: tuple[int | None, ...] = (None,)) -> CacheProblem:
    model = tiny_model(family)
    structure = cache_structure(model, decoder_structure(model))
    identity = torch.eye(structure[0].numbers, dtype=torch.float64)
    known = CacheStatistics(identity, identity, identity[0] * 0, identity, identity[0])
    statistics = {side.source: known for side in structure}
    dense = sum(2 * side.numbers for side in structure)
    tokens = torch.arange(48).view(3, 16) % 250
    bases = bases_of(structure, statistics, 1)
    return CacheProblem(model, structure, bases, tokens, tokens, int(kept * dense), 1, bits)


@pytest.mark.parametrize("total", [4, 17, 40, 63, 64])
def test_ranks_follow_shares_are_capped_and_use_the_budget(total: int) -> None:
    shares = np.array([8.0, 1.0, 3.0, 4.0])
    ranks = _proportional_ranks(shares, 16, total)
    assert ranks.sum() == total
    assert (ranks <= 16).all()
    uncapped = total * shares / shares.sum()
    if (uncapped <= 16).all():
        assert (np.abs(ranks - uncapped) <= 1).all()


def test_fisher_ranks_are_in_proportion_to_the_gradients_by_the_weights() -> None:
    problem = problem_of("llama", 0.5)
    model = problem.model
    worth = []
    for side in problem.structure:
        weight = model.get_submodule(side.source).weight
        squares = torch.zeros_like(weight)
        for text in problem.tokens:
            model.zero_grad()
            model(input_ids=text[None], labels=text[None]).loss.backward()
            squares += weight.grad.square()
        worth.append(float((squares / len(problem.tokens)).sqrt().mean()))
    full = problem.structure[0].numbers
    wanted = _proportional_ranks(np.array(worth), full, int(0.5 * full * len(worth)))
    model.zero_grad(set_to_none=True)
    found = [side.rank for side in allocate_by_fisher(problem).sides]
    assert found == list(wanted.clip(1))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bits", [(None,), (4,), (3,)])
def test_uniform_ranks_stay_within_the_budget(bits: tuple[int | None, ...]) -> None:
    problem = problem_of("llama", 0.5, bits)
    plan = allocate_uniformly(problem)
    assert plan.token_bytes <= problem.budget_bytes
    assert len({side.rank for side in plan.sides}) == 1


def test_keys_behind_a_norm_are_refused() -> None:
    with pytest.raises(InputError, match="matrices that give keys and values"):
        allocate_by_fisher(problem_of("qwen3", 0.5))
