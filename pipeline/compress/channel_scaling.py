"""Scale the channels that norms feed to linears, in place and without any change of the output.

A norm's gain is divided by D, and the columns of all linears that read the norm are multiplied by
it. Which norm feeds which linears is found by running the model; whether anything else reads it is
found by comparing the logits before and after, and what changed them is undone.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.precision import fast_products
from pipeline.model.norms import norms_before
from pipeline.model.structure import Group, Layer, probe_logits
from pipeline.progress import note, track

_RELATIVE_FLOOR = 1e-4


def _channel_scales(moment: torch.Tensor, power: float) -> torch.Tensor:
    """D of an input with S = E[x x^T] [n, n], float64 [n], with geometric mean 1.

    A power of 0 scales nothing, 1 makes all inputs equally large.

    Raises:
        ValueError: a power outside [0, 1], or a moment that is not finite.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power {power} is outside [0, 1]")
    sizes = moment.diagonal().double().clamp_min(0).sqrt()
    if not torch.isfinite(sizes).all():
        raise ValueError("the second moment holds NaN or infinite values")
    largest = float(sizes.max())
    if largest == 0:
        return torch.ones_like(sizes)
    scales = sizes.clamp_min(_RELATIVE_FLOOR * largest) ** power
    return scales / scales.log().mean().exp()


# Of the largest logit; the scaled model computes the same in another order.
_RELATIVE_CHANGE = 1e-4


@torch.no_grad()
def scale_channels_(
    model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, power: float
) -> list[str]:
    """Scale the inputs of every group that a norm feeds.

    Args:
        model: a decoder in evaluation mode, held in float32; changed in place.
        layers: its structure.
        tokens: calibration tokens, int64 [N, T].
        power: see `_channel_scales`.

    Returns:
        Names of the groups whose inputs are scaled.
    """
    norms = norms_before(model, [group.name for layer in layers for group in layer.groups])
    before = probe_logits(model).float()
    stream = LayerStream(model, layers, tokens)
    scales: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(track(layers, "channel scales")):
        with fast_products(model):
            moments = stream.advance(index)
        for group in layer.groups:
            if group.name in norms:
                scales[group.name] = _channel_scales(moments[group.name].mean(), power)
    groups = [g for layer in layers for g in layer.groups if g.name in scales]
    for group in groups:
        _scale_(model, norms[group.name], group, scales[group.name])
    change = (before - probe_logits(model).float()).abs().max()
    if change > _RELATIVE_CHANGE * before.abs().max():
        # A gain that is not multiplied as it stands (1 + w), or one that something else reads.
        for group in groups:
            _scale_(model, norms[group.name], group, 1 / scales[group.name])
        note("channels are not scaled: the model's norms do not multiply by their weights alone")
        return []
    return [group.name for group in groups]


def _scale_(model: PreTrainedModel, norm: str, group: Group, scales: torch.Tensor) -> None:
    """Divide a norm's gain (and bias) by the scales, and multiply its readers' columns."""
    module = model.get_submodule(norm)
    for parameter in module.parameters(recurse=False):
        parameter.div_(scales.to(parameter.dtype))
    for member in group.members:
        weight = model.get_submodule(member).weight
        weight.mul_(scales.to(weight.dtype))
