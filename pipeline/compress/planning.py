"""From a request to the plan that it asks for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.compress.by_loss import plan_by_loss
from pipeline.compress.methods import DEFAULT_METHOD, Method
from pipeline.compress.plan import RankPlan, load_plan, uniform_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.search import searched_plan
from pipeline.compress.survey import Survey, output_tails
from pipeline.errors import UsageError
from pipeline.model.structure import Layer


def make_plan(
    request: CompressRequest,
    model: PreTrainedModel,
    layers: list[Layer],
    tokens: torch.Tensor,
    survey: Survey | None,
) -> RankPlan:
    """The plan that the request names, or the one that its method makes.

    Args:
        request: method, budget, plan.
        model: not changed.
        layers: its structure.
        tokens: calibration tokens, int64 [N, T].
        survey: measured here if the method needs it; None when only a plan that needs none is
            wanted.

    Raises:
        UsageError: a budget that no plan can meet.
        InputError: a plan file that does not fit the model.
    """
    method, kept = request.resolved_method, request.keep_params
    given = load_plan(Path(request.plan), layers) if request.plan else None
    wanted = given is not None or kept < 1
    if method.needs_survey and survey is not None and wanted:
        chosen = spread(tokens, request.resolved_effort.survey_windows)
        survey.measure(model, layers, chosen, cat=method.cat, seed=request.seed)
    if given is not None:
        return given
    plan = _plan_of(method, request, model, layers, tokens, survey)
    if plan.kept_fraction > kept:
        raise UsageError(
            "The method keeps more than the budget, or leaves matrices with no rank at all.",
            where=f"--method {request.method}",
            observed=f"{plan.kept_fraction:.4f} kept",
            expected=f"at most {kept:.4f}",
            change=f"raise --keep-params, or use --method {DEFAULT_METHOD}",
        )
    return plan


def _plan_of(
    method: Method,
    request: CompressRequest,
    model: PreTrainedModel,
    layers: list[Layer],
    tokens: torch.Tensor,
    survey: Survey | None,
) -> RankPlan:
    kept, multiple = request.keep_params, request.rank_multiple
    if method.allocation == "searched" and kept < 1 and survey is not None:
        return searched_plan(
            layers, survey.curves, kept, cat=method.cat, skip=method.skip, multiple=multiple
        )
    if method.allocation == "by-loss" and kept < 1:
        tails = output_tails(model, layers, tokens)
        return plan_by_loss(
            layers, tails, tokens.numel(), kept, skip=method.skip, multiple=multiple
        )
    return uniform_plan(layers, kept, cat=method.cat, skip=method.skip, multiple=multiple)


def spread(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the windows [N, T], evenly spread over them."""
    return tokens[torch.linspace(0, len(tokens) - 1, min(count, len(tokens))).round().long()]
