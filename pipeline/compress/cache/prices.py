"""What errors in the cache really cost, against what the second order expects: a factor each.

Cutting moves all tokens the same way and costs more than half its Fisher-weighted square; rounding
is noise that averages out over the tokens attended to. One plan of each kind is run, on one side at
a time, and on text that the bases were not fitted to: on their own, cutting costs a fifth less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.divergence import divergence, log_chances
from pipeline.checkpoint.modeling_cache import remove_cache_maps
from pipeline.compress.cache.cache_plan import CachePlan
from pipeline.compress.cache.cache_search import CachePrices, CacheProblem, searched_cache
from pipeline.model.cache_structure import SIDES, Side
from pipeline.progress import track

# Of calibration text that is run for each plan; the original's logits are held meanwhile.
WINDOWS, _WINDOW_LENGTH = 8, 512
_KEPT, _BITS = 0.5, 4
# A plan that costs less than this, nats a token, tells nothing of the factor.
_LEAST_KL = 1e-6
Install = Callable[[PreTrainedModel, CachePlan], None]


@torch.no_grad()
def measured_prices(problem: CacheProblem, install: Install) -> CachePrices:
    """Run the model with keys or values cut, and rounded, and compare with the expected KL.

    Args:
        problem: the model is as it was afterwards.
        install: puts the maps of a plan into the model.
    """
    windows = problem.held_out[:WINDOWS, :_WINDOW_LENGTH]
    original = [
        log_chances(problem.model(input_ids=window[None], use_cache=False).logits[0]).half()
        for window in windows
    ]
    trials = {
        (kind, side): plan
        for kind, plan in (("truncation", _cut(problem)), ("rounding", _rounded(problem)))
        if kind == "truncation" or problem.bits != (None,)
        for side in SIDES
    }
    factors: dict[tuple[str, Side], float] = {}
    for (kind, side), plan in track(list(trials.items()), "prices of the cache"):
        own = [part for part in plan.sides if part.side == side]
        expected = sum(part.expected_kl or 0.0 for part in own)
        with _installed(problem.model, plan, side, install):
            measured = _mean_kl(problem.model, windows, original)
        usable = expected > _LEAST_KL and measured > 0
        factors[kind, side] = measured / expected if usable else 1.0
    truncation, rounding = (
        {side: factors.get((kind, side), 1.0) for side in SIDES}
        for kind in ("truncation", "rounding")
    )
    return CachePrices(truncation, rounding)


def _cut(problem: CacheProblem) -> CachePlan:
    """Half of the numbers, none of them rounded; of any widths."""
    dense_bytes = sum(2 * side.numbers for side in problem.structure)
    budget_bytes, form = int(_KEPT * dense_bytes), problem.form.of_any_widths
    return searched_cache(replace(problem, budget_bytes=budget_bytes, bits=(None,), form=form))


def _rounded(problem: CacheProblem) -> CachePlan:
    """All of the numbers, each of them rounded."""
    sides = []
    for side in problem.structure:
        rank = side.numbers // problem.groups
        losses = [basis.rounding_losses(_BITS)[rank] for basis in problem.bases[side.source]]
        sides.append(problem.latent(side, rank, _BITS, float(sum(losses))))
    return CachePlan(tuple(sides))


@contextmanager
def _installed(
    model: PreTrainedModel, plan: CachePlan, side: Side, install: Install
) -> Iterator[None]:
    """The maps of one side in the model, for a while."""
    kept = tuple(part for part in plan.sides if part.side == side)
    install(model, CachePlan(kept))
    try:
        yield
    finally:
        remove_cache_maps(model)


def _mean_kl(
    model: PreTrainedModel, windows: torch.Tensor, original: Sequence[torch.Tensor]
) -> float:
    """Mean KL(original || model), nats a token."""
    found = [
        divergence(before, model(input_ids=window[None], use_cache=False).logits[0])
        for window, before in zip(windows, original, strict=True)
    ]
    return sum(found) / len(found)
