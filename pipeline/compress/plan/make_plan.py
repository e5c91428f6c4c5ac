"""From a request to the plan that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.compress.cache.cache_plan import CachePlan
from pipeline.compress.cache.cache_search import cheapest_cache, joined
from pipeline.compress.calibrated import Calibrated
from pipeline.compress.methods import DEFAULT_METHOD
from pipeline.compress.plan.file_bytes import cache_map_bytes, fixed_bytes
from pipeline.compress.plan.plan import (
    EmbeddingChoice,
    GroupPlan,
    RankBudget,
    RankPlan,
    allocate_uniformly,
)
from pipeline.compress.plan.rank_search import BitsRequest, searched_bits
from pipeline.compress.request import CompressRequest
from pipeline.errors import UsageError
from pipeline.lazy import imported
from pipeline.progress import note
from pipeline.quantize.formats import RUNTIMES, Format, Runtime

# What weights cost, over what they are expected to: all layers of the default model, each alone
# (benchmarks/results/planned_cost.json). What embedding, LM head and cache cost is measured for
# each model; in a search of all of them it counts as what is expected of weights does.
_WEIGHTS_PRICE = 2.9


def make_plan(request: CompressRequest, calibrated: Calibrated) -> RankPlan:
    """The plan that the request names, or the one that its method makes.

    Args:
        request: method, budget, plan.
        calibrated: not changed; measured as far as the plan depends on it.

    Raises:
        UsageError: a budget that no plan can meet.
        InputError: a plan file that does not fit the model.
    """
    if request.plan:
        return _plan_of_user(request, calibrated)
    if request.shrinks_cache:
        calibrated.require_cache(request, None)
    method = request.resolved_method
    kept = 1.0 if method.quantizer or method.cache_alone else request.keep_params
    if method.allocation.needs_costs:
        calibrated.measure(request)
    if request.searches_bits:
        return _plan_in_bytes(request, calibrated)
    budget = RankBudget(kept, method.cat, method.skip, request.rank_multiple)
    allocate = imported(method.allocation.function) if kept < 1 else allocate_uniformly
    plan = allocate(calibrated, budget)
    if method.allocation.needs_costs and calibrated.price(request, plan):
        plan = allocate(calibrated, budget)
    if plan.kept_fraction > kept:
        raise UsageError(
            "The method keeps more than the budget, or leaves matrices with no rank at all.",
            where=f"--method {request.method}",
            observed=f"{plan.kept_fraction:.4f} kept",
            expected=f"at most {kept:.4f}",
            change=f"raise --keep-params, or use --method {DEFAULT_METHOD}",
        )
    return _in_one_format(plan, calibrated, request)


def _plan_of_user(request: CompressRequest, calibrated: Calibrated) -> RankPlan:
    """The plan in the file that the request names, checked against the model.

    Raises:
        UsageError: the plan and the request both say what becomes of the cache.
        InputError: a plan file that does not fit the model.
    """
    plan = RankPlan.load(Path(str(request.plan)), calibrated.layers, calibrated.embeddings)
    if request.shrinks_cache and plan.caches is not None:
        raise UsageError(
            "The plan says what becomes of the cache already.",
            where="--cache-bytes, --keep-cache",
            observed=f"a section 'caches' in {request.plan}",
            change="pass the plan alone, or take the section out of it",
        )
    if request.shrinks_cache or plan.caches is not None:
        calibrated.require_cache(request, plan.caches)
    return plan


def _in_one_format(plan: RankPlan, calibrated: Calibrated, request: CompressRequest) -> RankPlan:
    """The plan with the formats that the request names for all matrices, if it names any.

    Raises:
        UsageError: the runtime does not take a matrix of that width in its format.
    """
    layers = plan.layers
    if request.weights is not None:
        layers = {
            name: tuple(_in_format(group, request.weights) for group in groups)
            for name, groups in layers.items()
        }
    embeddings = {}
    if request.table is not None:
        if not calibrated.embeddings:
            note("--table: the embedding and the head are of no known kind, and stay as they are")
        embeddings = {name: request.table for names in calibrated.embeddings for name in names}
    for group in (group for groups in layers.values() for group in groups):
        for part, (format, columns) in _matrices_of(group).items():
            _require_taken(f"{part} of {group.members[0]}", format, columns, request)
    for name, format in embeddings.items():
        columns = calibrated.model.get_submodule(name).weight.shape[1]
        _require_taken(name, format, columns, request)
    return RankPlan(layers, embeddings)


def _matrices_of(group: GroupPlan) -> dict[str, tuple[str | None, int]]:
    """Format and columns of what a group stores."""
    if group.form == "dense":
        return {"the matrix": (group.up_format, group.columns)}
    width = group.columns - group.rank if group.form == "skip" else group.columns
    return {"A'": (group.down_format, width), "B'": (group.up_format, group.rank)}


def _require_taken(name: str, format: str | None, columns: int, request: CompressRequest) -> None:
    """Raise UsageError for a matrix that the runtime does not take."""
    runtime = RUNTIMES[request.runtime]
    if format is None or runtime.accepts(Format.parse(format), columns):
        return
    block = Format.parse(format).block
    raise UsageError(
        "The runtime takes matrices of whole blocks only.",
        where=f"--runtime {runtime.name}, {format}",
        observed=f"{columns} columns: {name}",
        expected=f"a multiple of {block}",
        change=f"pass --rank-multiple {block}, or another format: {runtime.takes}",
    )


def _in_format(group: GroupPlan, format: str) -> GroupPlan:
    down = None if group.form == "dense" else format
    return replace(group, down_format=down, up_format=format, reason=None)


def _plan_in_bytes(request: CompressRequest, calibrated: Calibrated) -> RankPlan:
    """Ranks and bits under the budget of bytes that the request names.

    The maps of a smaller cache are weights; with a context, what is cached of it counts as well.
    """
    runtime = RUNTIMES[request.runtime]
    choices = _Choices(
        calibrated.embedding_choices(runtime),
        calibrated.cache_choices(request) if request.shrinks_cache else [],
    )
    plan, cache = _searched_in_bytes(request, calibrated, choices, _WEIGHTS_PRICE)
    if calibrated.price(request, plan):
        plan, cache = _searched_in_bytes(request, calibrated, choices, 1.0)
    if cache is None:
        return plan
    if request.context:
        note(
            f"of the budget, {request.context * cache.token_bytes / 1e6:.2f} MB go to the cache of "
            f"{request.context} tokens, {cache.token_bytes} bytes each"
        )
    note(f"{_bytes_of_maps(cache, runtime) / 1e6:.2f} MB of the weights are maps of the cache")
    return replace(plan, caches=cache.to_json())


class _Choices(NamedTuple):
    """What is searched beside ranks and bits of the layers, with what it is measured to cost.

    Attributes:
        embeddings: every way to store each embedding and LM head.
        caches: every way to cache each side, or each layer; none where the cache stays as it is.
    """

    embeddings: list[list[EmbeddingChoice]]
    caches: list[list[CachePlan]]


def _searched_in_bytes(
    request: CompressRequest, calibrated: Calibrated, choices: _Choices, price: float
) -> tuple[RankPlan, CachePlan | None]:
    """Of the layers, and of the cache; `price` is what a nat that layers expect costs in nats."""
    method, runtime = request.resolved_method, RUNTIMES[request.runtime]
    cache, sides = None, choices.caches
    if sides and not request.context:
        full = sum(side[0].dense_bytes for side in sides)
        cache = cheapest_cache(sides, request.cache_budget(full))
    whole = sum(parameter.numel() for parameter in calibrated.model.parameters())
    whole -= calibrated.added_parameters
    plan, places = searched_bits(
        calibrated.layers,
        calibrated.statistics.curves,
        calibrated.statistics.quantization,
        [[replace(c, loss=c.loss / price) for c in of_one] for of_one in choices.embeddings],
        BitsRequest(
            budget_bytes=request.budget_bytes(2 * whole),
            fixed_bytes=_fixed_bytes(calibrated, runtime) + _bytes_of_maps(cache, runtime),
            runtime=runtime,
            cat=method.cat,
            skip=method.skip,
            multiple=request.rank_multiple,
        ),
        [_sizes_and_losses(side, request, price) for side in sides] if request.context else [],
    )
    if request.context:
        cache = joined(side[place] for side, place in zip(sides, places, strict=True))
    return plan, cache


def _fixed_bytes(calibrated: Calibrated, runtime: Runtime) -> int:
    groups = (group for layer in calibrated.layers for group in layer.groups)
    chosen = {member for group in groups for member in group.members}
    chosen |= {name for names in calibrated.embeddings for name in names}
    return fixed_bytes(calibrated.model, chosen, calibrated.rotary_width, runtime)


def _bytes_of_maps(cache: CachePlan | None, runtime: Runtime) -> int:
    return 0 if cache is None else sum(cache_map_bytes(side, runtime) for side in cache.sides)


def _sizes_and_losses(
    plans: Sequence[CachePlan], request: CompressRequest, price: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of every way to cache a side or a layer: bytes of maps and all tokens; what it costs."""
    runtime, context = RUNTIMES[request.runtime], request.context or 0
    sizes = [_bytes_of_maps(plan, runtime) + context * plan.token_bytes for plan in plans]
    losses = [plan.expected_kl / price for plan in plans]
    return np.array(sizes), np.array(losses)
