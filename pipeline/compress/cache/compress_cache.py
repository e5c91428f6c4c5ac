"""Give a model a smaller cache: measure, plan, put the maps in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from pipeline.artefact import write_json
from pipeline.checkpoint.modeling_cache import (
    LatentCache,
    attach_cache_maps,
    cache_maps,
    rotation_of,
)
from pipeline.checkpoint.unrounded_latents import unrounded_latents
from pipeline.compress.cache.cache_plan import CachePlan, SidePlan
from pipeline.compress.cache.cache_search import (
    CachePrices,
    CacheProblem,
    bases_of,
    choices_of,
    searched_cache,
)
from pipeline.compress.cache.key_rotations import key_rotations
from pipeline.compress.cache.latent_basis import LatentBasis
from pipeline.compress.cache.prices import measured_prices
from pipeline.compress.cache.statistics import CacheStatistics, measure_cache
from pipeline.compress.request import CompressRequest
from pipeline.errors import InputError, UsageError
from pipeline.json_file import read_json_object
from pipeline.lazy import imported
from pipeline.model.cache_structure import CachedSide, cache_structure
from pipeline.model.structure import Layer
from pipeline.progress import note
from pipeline.quantize.rotations import random_rotation

# Logits of so many tokens, relative to their largest.
_PROVED_TOKENS, _SAME = 16, 1e-2
_Bases = Mapping[str, Sequence[LatentBasis]]


class CacheText(NamedTuple):
    """Calibration text.

    Attributes:
        tokens: what the maps are fitted to, int64 [N, T].
        held_out: what their prices are measured on, int64 [M, T]; other windows, if there are any.
    """

    tokens: torch.Tensor
    held_out: torch.Tensor


def compress_cache_(
    model: PreTrainedModel,
    layers: list[Layer],
    text: CacheText,
    request: CompressRequest,
    planned: Any,
    folder: Path,
    settings: dict[str, Any],
) -> CachePlan:
    """Choose and install the maps of a smaller cache.

    Args:
        model: a decoder whose weights are as they will be stored; changed in place.
        layers: its structure.
        text: calibration text.
        request: what the cache may take.
        planned: the section `caches` of the plan that the user gave; None to search one.
        folder: where measurements are kept; an interrupted one continues there.
        settings: everything they depend on.

    Raises:
        InputError: a model of which it is not known what it caches, or how its keys are turned.
        UsageError: a budget that no cache can meet, or groups that do not divide the heads.
    """
    structure, plan = checked_cache(model, layers, request, planned)
    statistics = measure_cache(model, layers, structure, text.tokens, folder, settings)
    bases = _bases(model, structure, statistics, request)
    if plan is None:
        plan = _planned(model, structure, bases, text, request, folder)
    # All of them before the first map is in its place: some are read off the running model.
    own = {s.source: bases(s.groups, s.is_narrow)[s.source] for s in plan.sides if s.form != "full"}
    _install_cache_(model, plan, bases_for=lambda side: own[side.source], seed=request.seed)
    _require_equal_latents(model, text.tokens)
    return plan


def _bases(
    model: PreTrainedModel,
    structure: Sequence[CachedSide],
    statistics: Mapping[str, CacheStatistics],
    request: CompressRequest,
) -> Callable[[int, bool], _Bases]:
    """(groups of heads, whether keys are mapped after they were turned) -> all bases."""
    row = request.resolved_method.cache

    @cache
    def found(groups: int, narrow: bool) -> _Bases:
        turned = key_rotations(model, structure, request.cache_length) if narrow else {}
        return bases_of(
            structure,
            statistics,
            groups,
            two_sided=row.two_sided,
            centred=row.centred,
            rotations=turned,
        )

    return found


def cache_choices(
    model: PreTrainedModel,
    layers: list[Layer],
    text: CacheText,
    request: CompressRequest,
    folder: Path,
    settings: dict[str, Any],
) -> list[list[CachePlan]]:
    """Every way to cache each side, or each layer, in their order, and what it should cost.

    Args:
        model: a decoder, as `compress_cache_` takes it; not changed.
        layers: its structure.
        text: calibration text.
        request: groups and bits of latents.
        folder: where measurements are kept; an interrupted one continues there.
        settings: everything they depend on.

    Raises:
        InputError, UsageError: as `compress_cache_`.
    """
    structure, _ = checked_cache(model, layers, request, None)
    statistics = measure_cache(model, layers, structure, text.tokens, folder, settings)
    bases = _bases(model, structure, statistics, request)
    everything = sum(2 * side.numbers for side in structure)
    return choices_of(_priced(model, structure, bases, text, request, everything, folder))


def checked_cache(
    model: PreTrainedModel, layers: list[Layer], request: CompressRequest, planned: Any
) -> tuple[list[CachedSide], CachePlan | None]:
    """What the model caches, and the plan that the user gave for it; nothing is measured.

    Args:
        model: a decoder.
        layers: its structure.
        request: what the cache may take.
        planned: the section `caches` of the user's plan; None to search one.

    Raises:
        InputError, UsageError: as `compress_cache_` says, or a plan that is not one of this model.
    """
    structure = cache_structure(model, layers)
    _require_known_rotation(model, structure)
    _require_groups(structure, request.cache_groups)
    plan = None if planned is None else CachePlan.from_json(planned, structure, request.plan)
    return structure, plan


def _planned(
    model: PreTrainedModel,
    structure: Sequence[CachedSide],
    bases: Callable[[int, bool], _Bases],
    text: CacheText,
    request: CompressRequest,
    folder: Path,
) -> CachePlan:
    """The plan of the request's method under its budget."""
    budget_bytes = request.cache_budget(sum(2 * side.numbers for side in structure))
    problem = _priced(model, structure, bases, text, request, budget_bytes, folder)
    plan: CachePlan = imported(request.resolved_method.cache.allocate)(problem)
    if problem.form.even:
        _note_price_of_one_width(problem, plan)
    return plan


def _note_price_of_one_width(problem: CacheProblem, plan: CachePlan) -> None:
    """Say what keys and values of any widths would cost in as many bytes."""
    free = searched_cache(replace(problem, form=problem.form.of_any_widths))
    note(
        "keys and values of a layer are of one width, for attention of any runtime: the cache "
        f"should cost {plan.expected_kl:.3g} nats a token, and {free.expected_kl:.3g} with widths "
        "of their own (--cache-form narrow --cache-bits float)"
    )


def _priced(
    model: PreTrainedModel,
    structure: Sequence[CachedSide],
    bases: Callable[[int, bool], _Bases],
    text: CacheText,
    request: CompressRequest,
    budget_bytes: int,
    folder: Path,
) -> CacheProblem:
    """The problem, with prices that were measured where the method has any, or once and kept."""
    form = request.form_of_cache
    groups = structure[0].heads if form.by_head else request.cache_groups
    own = bases(groups, form.by_head)
    problem = CacheProblem(
        model, structure, own, *text, budget_bytes, groups, request.cache_formats, form=form
    )
    if not request.resolved_method.cache.two_sided:
        return problem
    put = partial(_install_cache_, bases_for=lambda side: own[side.source], seed=request.seed)
    rounded = "" if problem.bits == (None,) else "-rounded"
    kept = folder / f"prices-{request.cache_form}-{groups}{rounded}.json"
    if kept.is_file():
        return replace(problem, prices=CachePrices.from_json(read_json_object(kept), kept))
    prices = measured_prices(problem, put)
    write_json(kept, asdict(prices))
    return replace(problem, prices=prices)


def _install_cache_(
    model: PreTrainedModel,
    plan: CachePlan,
    *,
    bases_for: Callable[[SidePlan], Sequence[LatentBasis]],
    seed: int,
) -> None:
    """Put the maps of a plan into a model.

    Args:
        model: changed in place.
        plan: of its cache.
        bases_for: of a side, the basis of each of its groups.
        seed: of the rotations of what is rounded.
    """
    latent = [side for side in plan.sides if side.form != "full"]
    attach_cache_maps(model, plan.entries())
    maps = cache_maps(model)
    for number, side in enumerate(latent):
        made = maps[f"{side.source.rpartition('.')[0]}.{side.side}_map"]
        for group, basis in enumerate(bases_for(side)):
            for name, tensor in _parts_of(side, basis, seed + number).items():
                held = getattr(made, name)
                held.data[group] = tensor.to(held.dtype)


def _parts_of(side: SidePlan, basis: LatentBasis, seed: int) -> dict[str, torch.Tensor]:
    """What a map holds; coordinates that share a step are turned, for they should be alike."""
    if side.error_feedback and side.bits is not None:
        down, up, feedback = basis.fed_maps(side.rank, side.bits, seed)
        return {"down": down, "up": up, "mean": basis.mean, "feedback": feedback}
    rotation = None if side.bits is None else random_rotation(side.rank, seed)
    down, up = basis.maps(side.rank, balanced=True, rotation=rotation)
    return {"down": down, "up": up, "mean": basis.mean}


@torch.no_grad()
def _require_equal_latents(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Run a few tokens with what is cached in full, and as latents in two calls.

    Without rounding: a number between two codes may fall to either side of them.

    Raises:
        InputError: the logits differ, so that something about this model's cache is not understood.
    """
    ids = tokens[:1, :_PROVED_TOKENS].to(model.device)
    cache = LatentCache(model)
    with unrounded_latents(model):
        wanted = model(input_ids=ids, use_cache=False).logits
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(_PROVED_TOKENS // 2, dim=1)
        ]
    error = (torch.cat(parts, dim=1) - wanted).abs().max() / wanted.abs().max()
    if not error <= _SAME:
        raise InputError(
            "Latents in the cache of this model do not give what they stand for.",
            where=type(model).__name__,
            observed=f"logits off by {float(error):.2g} of their largest",
            expected=f"at most {_SAME:g}",
            change="compress it without a budget for the cache",
        )


def _require_groups(structure: Sequence[CachedSide], groups: int) -> None:
    """Raise UsageError for a number of groups that does not divide the heads."""
    heads = structure[0].heads
    if groups < 1 or heads % groups:
        fitting = [count for count in range(1, heads + 1) if heads % count == 0]
        raise UsageError(
            "The heads cannot be divided into so many groups.",
            where="--cache-groups",
            observed=f"{groups} groups of {heads} key/value heads",
            expected=f"one of {', '.join(map(str, fitting))}",
        )


def _require_known_rotation(model: PreTrainedModel, structure: Sequence[CachedSide]) -> None:
    """Refuse keys that could not be turned again after they were rebuilt.

    Raises:
        InputError: names the attention.
    """
    for side in structure:
        holder = side.source.rpartition(".")[0]
        if side.is_rotated and rotation_of(model.get_submodule(holder)) is None:
            raise InputError(
                "The keys of this model cannot be rebuilt: it is not known how they are turned.",
                where=holder,
                expected="a function apply_rotary_pos_emb(q, k, cos, sin) beside the attention",
                change="compress it without a budget for the cache",
            )
