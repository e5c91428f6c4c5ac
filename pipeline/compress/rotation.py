"""Turn a decoder's residual stream, and its values' heads, without any change of the output.

The residual stream h becomes R h: embedding and every matrix that adds to the stream are multiplied
by R from the output side, every matrix that reads it by R^T from the input side, once the gain of
the norm between is folded into it, since an RMS norm without gain and R commute. Values v of every
head become Q v, and the matrix that reads the attention's output takes Q^T: attention mixes tokens,
never channels. Both fold into the weights (QuaRot: Ashkboos et al. 2024; SliceGPT for the gains).

What reads and what writes is found by running the model, and the logits must stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import InputError
from pipeline.model.cache_structure import CachedSide, cache_structure
from pipeline.model.norms import has_gain_alone, neutral_gain, norms_before
from pipeline.model.structure import Layer, probe_logits
from pipeline.progress import note
from pipeline.quantize.rotations import flat_rotation, multiply_rows_

# Of the largest logit; the turned model computes the same in another order.
_RELATIVE_CHANGE = 1e-4
# The first seed of the values' heads; a layer each.
_SEED_OF_VALUES = 1
Draw = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class _Rotated:
    """What was turned.

    Attributes:
        turned: a name in ROTATIONS, but for "off".
        seed: of all rotations.
        width: of the residual stream; 0 where it was left.
        added_parameters: of a head that shared the embedding's matrix, and has its own now.
    """

    turned: str
    seed: int
    width: int = 0
    added_parameters: int = 0

    def describe(self) -> dict[str, Any]:
        """The entry of recipe.json."""
        return asdict(self)


@torch.no_grad()
def rotate_(
    model: PreTrainedModel,
    layers: list[Layer],
    what: str,
    seed: int,
    draw: Draw = flat_rotation,
) -> _Rotated:
    """Turn the values' heads, and the residual stream if all is asked for, folded into the weights.

    Args:
        model: a decoder in evaluation mode, in float32; changed in place. Refused, it is broken.
        layers: its structure.
        what: a name in ROTATIONS, but for "off".
        seed: of the rotations.
        draw: (size, seed) -> an orthogonal matrix, float64.

    Raises:
        InputError: a model in another type, or of a structure through which nothing turns; says
            what stands in the way.
    """
    if model.dtype != torch.float32:
        raise _refused(
            model,
            f"weights held in {str(model.dtype).removeprefix('torch.')}",
            "weights in float32, in which turning them loses nothing",
            "use a machine with more memory, or leave out --stream-weights",
        )
    before = probe_logits(model).float()
    values = [side for side in cache_structure(model, layers) if side.side == "value"]
    for index, (layer, side) in enumerate(zip(layers, values, strict=True)):
        _turn_values_(model, layer, side, draw(side.width, seed + _SEED_OF_VALUES + index))
    _require_same(model, before, "the heads of values")
    if what == "values":
        return _Rotated(what, seed)
    stream = _Stream(model, layers)
    added = _untie_(model)
    stream.turn_(draw(stream.width, seed))
    _require_same(model, before, "the residual stream")
    return _Rotated(what, seed, stream.width, added)


def _turn_values_(
    model: PreTrainedModel, layer: Layer, side: CachedSide, turn: torch.Tensor
) -> None:
    """Turn every head of values, and back in the matrix that reads what attention makes of them."""
    source = model.get_submodule(side.source)
    block = side.source.rpartition(".")[0]
    readers = [
        group
        for group in layer.groups
        if group.name.rpartition(".")[0] == block
        and side.source not in group.members
        and group.in_features % side.width == 0
    ]
    if not isinstance(source, nn.Linear) or len(readers) != 1:
        raise _refused(
            model,
            f"{side.source}, a {type(source).__name__}, beside {len(readers)} matrices of its "
            "block that may read its heads",
            "values of a linear, whose heads one other linear of the block reads",
        )
    _turn_outputs_(source, turn)
    for member in readers[0].members:
        _turn_inputs_(model.get_submodule(member), turn)


def _turn_outputs_(linear: nn.Module, turn: torch.Tensor) -> None:
    """Multiply what a linear returns by R, in pieces as wide as R."""
    weight, bias = linear.weight, getattr(linear, "bias", None)
    assert isinstance(weight, nn.Parameter)
    for rows in weight.split(len(turn)):
        multiply_rows_(rows.T, turn.T)
    if isinstance(bias, nn.Parameter):
        multiply_rows_(bias.view(-1, len(turn)), turn.T)


def _turn_inputs_(linear: nn.Module, turn: torch.Tensor) -> None:
    """Let a linear, or an embedding as what it returns, meet R x where it met x, in pieces."""
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    for columns in weight.split(len(turn), dim=1):
        multiply_rows_(columns, turn.T)


class _Stream:
    """What reads the residual stream of a decoder, and what adds to it.

    Raises:
        InputError: a structure in which a rotation does not fold; says what stands in the way.
    """

    def __init__(self, model: PreTrainedModel, layers: list[Layer]) -> None:
        self.model = model
        names = {id(module): name for name, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
            raise _refused(
                model,
                f"embedding {type(embedding).__name__}, head {type(head).__name__}",
                "an nn.Embedding, and an nn.Linear as the head",
            )
        self.embedding, self.head = embedding, names[id(head)]
        self.width = embedding.embedding_dim
        groups = [group for layer in layers for group in layer.groups]
        self.norms = norms_before(model, [*(group.name for group in groups), self.head])
        self.readers = [group for group in groups if group.name in self.norms]
        self.writers = [group for group in groups if group.name not in self.norms]
        self.neutral = {name: self._neutral(name) for name in set(self.norms.values())}
        self._require_plain()

    def _neutral(self, name: str) -> float:
        norm = self.model.get_submodule(name)
        found = neutral_gain(norm)
        if found is None:
            raise _refused(
                self.model,
                f"{name}, a {type(norm).__name__} that subtracts a mean, or adds a bias",
                "RMS norms in front of every matrix that reads the residual stream",
            )
        return found

    def _require_plain(self) -> None:
        """Every matrix reads the stream behind a norm, or adds to it; nothing else touches it."""
        width, expected = self.width, "norms that feed matrices, and matrices that add to the sum"
        if self.head not in self.norms:
            raise _refused(self.model, f"{self.head} reads no norm", expected)
        for group in self.writers:
            if set(group.out_features) != {width}:
                raise _refused(self.model, f"{group.name} reads no norm", expected)
        for group in self.readers:
            if group.in_features != width:
                raise _refused(self.model, f"{group.name} reads a norm of another width", expected)
        for name, module in self.model.named_modules():
            if has_gain_alone(module) and len(module.weight) == width and name not in self.neutral:
                observed = f"{name} has a gain for every channel, and feeds no matrix"
                raise _refused(self.model, observed, expected)

    def turn_(self, turn: torch.Tensor) -> None:
        """Fold the gains and R into the weights."""
        readers = {group.name: group.members for group in self.readers} | {self.head: (self.head,)}
        for name, norm in self.norms.items():
            gain = self.model.get_submodule(norm).weight + (1 - self.neutral[norm])
            for member in readers[name]:
                linear = self.model.get_submodule(member)
                linear.weight.mul_(gain)
                _turn_inputs_(linear, turn)
        for norm, neutral in self.neutral.items():
            self.model.get_submodule(norm).weight.fill_(neutral)
        for group in self.writers:
            for member in group.members:
                _turn_outputs_(self.model.get_submodule(member), turn)
        _turn_inputs_(self.embedding, turn)


def _untie_(model: PreTrainedModel) -> int:
    """Give the head a matrix of its own, which the gain folded into it asks for; its parameters."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not table.weight:
        return 0
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    note(
        f"the head has a matrix of its own now, of {head.weight.numel():,} numbers: the last "
        "norm's gain is folded into it (--rotate values leaves it)"
    )
    return head.weight.numel()


def _require_same(model: PreTrainedModel, before: torch.Tensor, what: str) -> None:
    """Raise InputError where the logits are no longer what they were."""
    change = float((before - probe_logits(model).float()).abs().max())
    if not change <= _RELATIVE_CHANGE * float(before.abs().max()):
        raise _refused(
            model,
            f"logits that change by {change:.1e} when {what} are turned",
            "a decoder in which nothing but matrices and norms touches them",
        )


def _refused(
    model: nn.Module, observed: str, expected: str, change: str = "leave --rotate out"
) -> InputError:
    return InputError(
        "A rotation does not fold into this model's weights.",
        where=f"{type(model).__name__}, --rotate",
        observed=observed,
        expected=expected,
        change=change,
    )
