"""From a request to the plan that it asks for, for an image classifier."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from pipeline.calibrate.whole_model import ImageSurvey
from pipeline.compress.factorize.whitened_svd import tails_of, whitened_energies
from pipeline.compress.methods import DEFAULT_METHOD
from pipeline.compress.plan.bit_search import BitsRequest, searched_bits
from pipeline.compress.plan.file_bytes import NAME_BYTES
from pipeline.compress.plan.make_plan import in_one_format
from pipeline.compress.plan.plan import RankPlan, load_plan, uniform_plan
from pipeline.compress.plan.rank_search import searched_plan
from pipeline.compress.plan.svd_llm_v2 import plan_by_loss
from pipeline.compress.request import CompressRequest
from pipeline.errors import UsageError
from pipeline.model.structure import Layer
from pipeline.quantize.formats import RUNTIMES, Runtime


def make_image_plan(
    request: CompressRequest, model: PreTrainedModel, layers: list[Layer], survey: ImageSurvey
) -> RankPlan:
    """The plan that the request names, or the one that its method makes.

    Args:
        request: method, budget, plan.
        model: not changed.
        layers: its structure.
        survey: measured; with gradients if the method needs them.

    Raises:
        UsageError: a budget that no plan can meet.
        InputError: a plan file that does not fit the model.
    """
    method, kept, multiple = request.resolved_method, request.keep_params, request.rank_multiple
    if request.plan:
        return load_plan(Path(request.plan), layers)
    if request.searches_bits:
        return _plan_in_bytes(request, model, layers, survey)
    if kept == 1 or method.allocation == "uniform":
        plan = uniform_plan(layers, kept, cat=method.cat, skip=method.skip, multiple=multiple)
    elif method.allocation == "searched":
        plan = searched_plan(
            layers, survey.curves, kept, cat=method.cat, skip=method.skip, multiple=multiple
        )
    else:
        _require_equal_layers(request.method, layers)
        rows = min(sums.inputs.tokens for sums in survey.sums.values())
        tails = {
            member: tails_of(
                whitened_energies(
                    model.get_submodule(member).weight.detach(), survey.moment((member,))
                )
            ).numpy()
            for member in survey.groups
        }
        plan = plan_by_loss(layers, tails, rows, kept, skip=method.skip, multiple=multiple)
    if plan.kept_fraction > kept:
        raise UsageError(
            "The method keeps more than the budget, or leaves matrices with no rank at all.",
            where=f"--method {request.method}",
            observed=f"{plan.kept_fraction:.4f} kept",
            expected=f"at most {kept:.4f}",
            change=f"raise --keep-params, or use --method {DEFAULT_METHOD}",
        )
    return in_one_format(plan, model, request)


def _plan_in_bytes(
    request: CompressRequest, model: PreTrainedModel, layers: list[Layer], survey: ImageSurvey
) -> RankPlan:
    """Ranks and bits under the budget of bytes that the request names; no tables to choose for."""
    method, runtime = request.resolved_method, RUNTIMES[request.runtime]
    whole = sum(parameter.numel() for parameter in model.parameters())
    return searched_bits(
        layers,
        survey.curves,
        survey.noises,
        [],
        BitsRequest(
            budget_bytes=request.budget_bytes(2 * whole),
            fixed_bytes=fixed_bytes(model, layers, runtime),
            runtime=runtime,
            cat=method.cat,
            skip=method.skip,
            multiple=request.rank_multiple,
        ),
    )


def fixed_bytes(model: PreTrainedModel, layers: list[Layer], runtime: Runtime) -> int:
    """Bytes of the weights that nothing is chosen for, in a runtime's file, names included."""
    chosen = {f"{m}.weight" for layer in layers for g in layer.groups for m in g.members}
    return sum(
        parameter.numel() * runtime.float_bytes + NAME_BYTES
        for name, parameter in model.named_parameters()
        if name not in chosen
    )


def _require_equal_layers(method: str, layers: list[Layer]) -> None:
    """Raise UsageError where there are no kinds of equal matrices, which by-loss plans compare."""
    shapes = {
        tuple((group.in_features, group.out_features) for group in layer.groups) for layer in layers
    }
    if len(shapes) > 1:
        raise UsageError(
            "This method compares the matrices of equal layers, and the model's differ.",
            where=f"--method {method}",
            observed=f"{len(shapes)} kinds of layers",
            change=f"use --method {DEFAULT_METHOD}",
        )
