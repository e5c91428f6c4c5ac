"""From a request to the plan that it asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.compress.embeddings import table_choices
from pipeline.compress.methods import DEFAULT_METHOD, Method
from pipeline.compress.plan.bit_search import BitsRequest, searched_bits
from pipeline.compress.plan.file_bytes import NAME_BYTES
from pipeline.compress.plan.layer_costs import Survey, output_tails
from pipeline.compress.plan.plan import GroupPlan, RankPlan, load_plan, uniform_plan
from pipeline.compress.plan.rank_search import searched_plan
from pipeline.compress.plan.svd_llm_v2 import plan_by_loss
from pipeline.compress.request import CompressRequest
from pipeline.errors import UsageError
from pipeline.model.embeddings import find_tables
from pipeline.model.structure import Layer
from pipeline.progress import note
from pipeline.quantize.formats import RUNTIMES, Runtime, parse_format

# Of an export.
DEFAULT_MAX_LENGTH = 2048


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
    method = request.resolved_method
    kept = 1.0 if method.quantizer else request.keep_params
    given = load_plan(Path(request.plan), layers) if request.plan else None
    wanted = given is not None or kept < 1 or request.searches_bits or request.weights is not None
    if method.needs_survey and survey is not None and wanted:
        chosen = spread(tokens, request.resolved_effort.survey_windows)
        survey.measure(
            model,
            layers,
            chosen,
            cat=method.cat,
            seed=request.seed,
            styles=request.formats,
            form="skip" if method.skip else "low_rank",
        )
    if given is not None:
        return given
    if request.searches_bits:
        return _plan_in_bytes(request, model, layers, tokens, survey)
    plan = _plan_of(method, request, model, layers, tokens, survey)
    if plan.kept_fraction > kept:
        raise UsageError(
            "The method keeps more than the budget, or leaves matrices with no rank at all.",
            where=f"--method {request.method}",
            observed=f"{plan.kept_fraction:.4f} kept",
            expected=f"at most {kept:.4f}",
            change=f"raise --keep-params, or use --method {DEFAULT_METHOD}",
        )
    return in_one_format(plan, model, request)


def in_one_format(plan: RankPlan, model: PreTrainedModel, request: CompressRequest) -> RankPlan:
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
    tables = {}
    if request.table is not None:
        found = find_tables(model).groups
        if not found:
            note("--table: the embedding and the head are of no known kind, and stay as they are")
        tables = {name: request.table for names in found for name in names}
    widths = {name: model.get_submodule(name).weight.shape[1] for name in tables}
    for group in (group for groups in layers.values() for group in groups):
        for part, (style, columns) in _matrices_of(group).items():
            _require_taken(f"{part} of {group.members[0]}", style, columns, request)
    for name, style in tables.items():
        _require_taken(name, style, widths[name], request)
    return RankPlan(layers, tables)


def _matrices_of(group: GroupPlan) -> dict[str, tuple[str | None, int]]:
    """Format and columns of what a group stores."""
    if group.form == "dense":
        return {"the matrix": (group.up_style, group.columns)}
    width = group.columns - group.rank if group.form == "skip" else group.columns
    return {"A'": (group.down_style, width), "B'": (group.up_style, group.rank)}


def _require_taken(name: str, style: str | None, columns: int, request: CompressRequest) -> None:
    """Raise UsageError for a matrix that the runtime does not take."""
    runtime = RUNTIMES[request.runtime]
    if style is None or runtime.accepts(parse_format(style), columns):
        return
    block = parse_format(style).block
    raise UsageError(
        "The runtime takes matrices of whole blocks only.",
        where=f"--runtime {runtime.name}, {style}",
        observed=f"{columns} columns: {name}",
        expected=f"a multiple of {block}",
        change=f"pass --rank-multiple {block}, or another format: {runtime.takes}",
    )


def _in_format(group: GroupPlan, style: str) -> GroupPlan:
    down = None if group.form == "dense" else style
    return replace(group, down_style=down, up_style=style, reason=None)


def _plan_in_bytes(
    request: CompressRequest,
    model: PreTrainedModel,
    layers: list[Layer],
    tokens: torch.Tensor,
    survey: Survey | None,
) -> RankPlan:
    """Ranks and bits under the budget of bytes that the request names."""
    assert survey is not None
    method, runtime = request.resolved_method, RUNTIMES[request.runtime]
    tables = survey.kept_choices("tables", lambda: table_choices(model, tokens, runtime))
    named = {name for names in find_tables(model).groups for name in names}
    whole = sum(parameter.numel() for parameter in model.parameters())
    return searched_bits(
        layers,
        survey.curves,
        survey.noises,
        tables,
        BitsRequest(
            budget_bytes=request.budget_bytes(2 * whole),
            fixed_bytes=fixed_bytes(model, layers, named, runtime),
            runtime=runtime,
            cat=method.cat,
            skip=method.skip,
            multiple=request.rank_multiple,
        ),
    )


def fixed_bytes(
    model: PreTrainedModel, layers: list[Layer], tables: set[str], runtime: Runtime
) -> int:
    """Bytes of the weights that nothing is chosen for, in a runtime's file, names included."""
    chosen = {m for layer in layers for group in layer.groups for m in group.members} | tables
    total = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if not (kind == "weight" and module in chosen):
            total += parameter.numel() * runtime.float_bytes + NAME_BYTES
    if runtime.name == "cpu":
        # The graph holds the angles of every position, cosines and sines.
        config = model.config.get_text_config()
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        limit = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
        total += min(DEFAULT_MAX_LENGTH, limit) * width * runtime.float_bytes
    return total


def _plan_of(
    method: Method,
    request: CompressRequest,
    model: PreTrainedModel,
    layers: list[Layer],
    tokens: torch.Tensor,
    survey: Survey | None,
) -> RankPlan:
    kept = 1.0 if method.quantizer else request.keep_params
    multiple = request.rank_multiple
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
